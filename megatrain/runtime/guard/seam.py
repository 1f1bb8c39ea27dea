"""The seam at which every collective of this process is written to its record.

Collectives of this project, of FSDP, of torch's pipeline schedules and of `torch.distributed` go through the methods of
`ProcessGroup` and end in `Work.wait`, under gloo and NCCL alike; both are wrapped here. What a compiled graph calls
does not pass here: there the record ends at the last collective before it.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor
from torch import distributed as dist

from megatrain.runtime.guard.record import Record, entry_text

METHODS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "reduce": "reduce",
    "_allgather_base": "all_gather",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "gather": "gather",
    "scatter": "scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "send": "send",
    "recv": "receive",
}
"""Method of `ProcessGroup` -> the collective; torch 2.13 renamed some of them."""
KNOWN = 4096
"""Texts of entries that are kept; MoE's uneven exchanges make ever new ones."""
PASSED_OVER = ("/torch/", "/megatrain/runtime/", "/megatrain/parallel/collectives.py", "<frozen")
"""Parts of file names of frames that do not say where a collective is called."""
Tell = Callable[[dict[str, Any]], None]


class Seam:
    """Writes the collectives of this process to `record`, and tells the guard of each channel with `tell`."""

    def __init__(self, record: Record, tell: Tell) -> None:
        self.record = record
        self._tell = tell
        self._channels: dict[Any, int] = {}
        self._texts: dict[Any, bytes] = {}
        self._files: dict[str, str] = {}
        self._original: list[tuple[type, str, Any]] = []
        self.failure: BaseException | None = None
        """The last error of a collective or of waiting for one."""

    def __enter__(self) -> "Seam":
        """Wrap the methods."""
        group, work = dist.ProcessGroup, dist.distributed_c10d.Work
        for name, operation in METHODS.items():
            if (method := vars(group).get(name)) is not None:  # as it stands in the class, to be put back
                self._replace(group, name, self._wrapped(operation, method))
        self._replace(work, "wait", self._wrapped_wait(vars(work)["wait"]))
        return self

    def __exit__(self, *_: object) -> None:
        """Put the methods back."""
        for owner, name, method in reversed(self._original):
            setattr(owner, name, method)
        self._original.clear()

    def met(self, number_of: str, ranks: list[int]) -> None:
        """Note that this process comes to a meeting at the store, which `waited` of the record ends."""
        channel = self._channel(number_of, {"name": number_of, "ranks": ranks, "pair": False})
        self.record.entered(channel, self._text(channel, "meeting", None, sys._getframe(2)))

    def _replace(self, owner: type, name: str, method: Callable[..., Any]) -> None:
        self._original.append((owner, name, vars(owner)[name]))
        setattr(owner, name, method)

    def _wrapped(self, operation: str, method: Any) -> Callable[..., Any]:
        record, is_pair = self.record, operation in ("send", "receive")

        def call(group: Any, *args: Any, **options: Any) -> Any:
            channel = self._channel_of(group, operation, args if is_pair else ())
            if channel is None:
                return method(group, *args, **options)
            record.entered(channel, self._text(channel, operation, _tensor(args), sys._getframe(1)))
            try:
                work = method(group, *args, **options)
            except BaseException as error:
                self.failure = error
                raise
            record.waited()
            return work

        return call

    def _wrapped_wait(self, method: Any) -> Callable[..., Any]:
        record = self.record

        def wait(work: Any, *args: Any, **options: Any) -> Any:
            record.waits()
            try:
                done = method(work, *args, **options)
            except BaseException as error:
                self.failure = error
                raise
            record.waited()
            return done

        return wait

    def _channel_of(self, group: Any, operation: str, args: tuple[Any, ...]) -> int | None:
        """Return the channel of a call; None in a group of one rank, in which nothing is sent."""
        key = (group, operation, args[1]) if len(args) > 1 else group
        try:
            return self._channels[key]
        except KeyError:
            pass
        if group.size() == 1:
            return None
        name, ranks = group.group_name, dist.get_process_group_ranks(group)
        if key is group:
            return self._channel(key, {"name": name, "ranks": ranks, "pair": False})
        ends = (group.rank(), args[1]) if operation == "send" else (args[1], group.rank())
        both = [ranks[end] for end in ends]
        return self._channel(key, {"name": f"{name} {both[0]}>{both[1]}", "ranks": both, "pair": True})

    def _channel(self, key: Any, facts: dict[str, Any]) -> int:
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = self.record.channel()
            self._tell({"do": "channel", "index": channel, **facts})
        return channel

    def _text(self, channel: int, operation: str, tensor: Tensor | None, frame: FrameType | None) -> bytes:
        """Return the entry of a call from `frame`."""
        at, line = self._site(frame)
        shape, dtype = (None, None) if tensor is None else (tensor.shape, tensor.dtype)
        key = (channel, operation, shape, dtype, at, line)
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) >= KNOWN:
                self._texts.clear()
            what = ("", "") if shape is None else (str(tuple(shape)), str(dtype).removeprefix("torch."))
            text = self._texts[key] = entry_text(channel, operation, *what, f"{at}:{line}")
        return text

    def _site(self, frame: FrameType | None) -> tuple[str, int]:
        """Return file and line of the nearest caller that is neither torch's nor one of general helpers."""
        outermost = ("", 0)
        while frame is not None:
            name = frame.f_code.co_filename
            shown = self._files.get(name)
            if shown is None:
                passed = any(part in name for part in PASSED_OVER)
                shown = self._files[name] = "" if passed else _short(name)
            if shown:
                return shown, frame.f_lineno
            outermost = name, frame.f_lineno
            frame = frame.f_back
        return _short(outermost[0]), outermost[1]


def _short(path: str) -> str:
    """Return the path from the package on, or the last parts of another one."""
    at = path.rfind("/megatrain/")
    return path[at + 1 :] if at >= 0 else "/".join(path.split("/")[-3:])


def _tensor(args: tuple[Any, ...]) -> Tensor | None:
    """Return the first tensor of the second argument, else of the first: of input and output the input."""
    for each in reversed(args[:2]):
        while isinstance(each, list | tuple) and each:
            each = each[0]
        if isinstance(each, Tensor):
            return each
    return None
