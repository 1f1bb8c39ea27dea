"""A machine that runs Gluon kernels in Python: partitions of warps as threads, and asynchronous acts late or early.

Triton's interpreter runs no Gluon. Here a kernel's own Python code runs, on torch tensors for tiles. What a GPU does in
its own time (copies to and from shared memory, products of warp groups) happens at times that a seed draws, as late as
the kernel allows or earlier; partitions take turns by the same seed. So a missing wait, a wrong phase or an order that
deadlocks shows as a wrong result or an error, in some seed. Checked beside: shared memory begins as NaN, addresses are
inside their tensors, a product's result is not read before it was waited for, and what threads have written to shared
memory is fenced before a copy or a product reads it. Not checked: layouts, registers, and races inside a partition.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

PACES = (0.02, 1.0, 50.0)
"""How often a partition or a kind of asynchronous act has its turn: each program draws who is slow and who is fast."""


class WrongKernelError(Exception):
    """The kernel did what a GPU does not allow, or waits for ever."""


def check(fits: bool, text: str) -> None:
    """Raise WrongKernelError with `text` unless `fits`."""
    if not fits:
        raise WrongKernelError(text)


@dataclass
class Descriptor:
    """A tensor in tiles, as the host describes it; beyond its edges there are zeros."""

    base: Tensor
    block: tuple[int, ...]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The elements' type."""
        return self.base.dtype

    @property
    def block_type(self) -> Any:
        """The size of a tile."""
        return SimpleNamespace(nbytes=torch.Size(self.block).numel() * self.base.itemsize)

    def region(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return where a tile at `at` lies in the tensor, and where that is in the tile."""
        outer, inner = [], []
        for start, size, limit in zip(at, self.block, self.base.shape, strict=True):
            first, last = max(start, 0), min(start + size, limit)
            outer.append(slice(first, max(first, last)))
            inner.append(slice(first - start, max(first, last) - start))
        return tuple(outer), tuple(inner)


@dataclass
class Pointer:
    """An address, or a block of addresses, in a tensor."""

    base: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        """Move by `more` elements."""
        return Pointer(self.base, self.at + more)

    def read(self, mask: Any, other: Any) -> Any:
        """Return the elements, or `other` where the mask says so."""
        if not isinstance(self.at, Tensor):
            check(0 <= self.at < self.base.numel(), f"address {self.at} outside {self.base.numel()}")
            return self.base.flatten()[self.at].item()
        inside = self._inside(mask)
        found = torch.full(self.at.shape, other if other is not None else 0, dtype=self.base.dtype)
        found[inside] = self.base.flatten()[self.at[inside]]
        return found

    def write(self, value: Tensor, mask: Any) -> None:
        """Store a block."""
        inside = self._inside(mask)
        self.base.view(-1)[self.at[inside]] = value.to(self.base.dtype)[inside]

    def _inside(self, mask: Any) -> Tensor:
        inside = torch.ones_like(self.at, dtype=torch.bool) if mask is None else mask
        wrong = inside & ((self.at < 0) | (self.at >= self.base.numel()))
        check(not wrong.any(), f"{int(wrong.sum())} addresses outside {self.base.numel()} elements")
        return inside


@dataclass
class Shared:
    """A view of shared memory."""

    data: Tensor
    unfenced: list[tuple[str, int, int]]
    """Which partitions wrote what parts of the allocation since their last fence."""
    machine: "Machine"

    @property
    def dtype(self) -> torch.dtype:
        """The elements' type."""
        return self.data.dtype

    def _view(self, data: Tensor) -> "Shared":
        return Shared(data, self.unfenced, self.machine)

    def index(self, at: int) -> "Shared":
        """Return one of a stack."""
        check(0 <= at < self.data.shape[0], f"buffer {at} of {self.data.shape[0]}")
        return self._view(self.data[at])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        """Return the same memory in another shape."""
        return self._view(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        """Return the same memory with its dimensions in another order."""
        return self._view(self.data.permute(*order))

    def store(self, value: Tensor) -> None:
        """Write by the threads of a partition."""
        check(value.dtype == self.dtype, f"{value.dtype} into {self.dtype}")
        self.data.copy_(value)
        self.unfenced.append((self.machine.name, *self._span()))
        self.machine.pause()

    def load(self, layout: Any) -> Tensor:
        """Read by the threads of a partition."""
        return self.data.clone()

    def _span(self) -> tuple[int, int]:
        return self.data.storage_offset(), self.data.storage_offset() + self.data.numel()

    def for_copies(self) -> Tensor:
        """Return the memory as copies and products see it."""
        first, last = self._span()
        wrote = {name for name, start, end in self.unfenced if start < last and first < end}
        check(not wrote, f"memory that {wrote} wrote is read without a fence")
        return self.data


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes have come."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        """Count arrivals, and bytes that are to come."""
        check(self.count > 0, "a barrier is used before init")
        self.bytes += expected
        self.left -= count
        check(self.left >= 0, "more arrivals than a barrier counts")
        self.settle()

    def settle(self) -> None:
        """Begin the next phase if this one has all it waits for."""
        if self.left == 0 and self.bytes == 0:
            self.phase ^= 1
            self.left = self.count

    def passed(self, phase: int) -> bool:
        """Return whether the latest phase of this parity has ended."""
        check(phase in (0, 1), f"parity {phase}")
        return self.phase != phase


@dataclass
class Product:
    """A product of a warp group that may still run."""

    run: Callable[[], Tensor]
    value: Tensor | None = None


@dataclass
class Partition:
    """Warps that go in step."""

    name: str
    pace: float
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    ended: bool = False
    products: list[Product] = field(default_factory=list)
    stores: list[Callable[[], None]] = field(default_factory=list)


class Machine:
    """Runs programs of a kernel one after the other."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.program = self.programs = 0
        self.partitions: dict[str, Partition] = {}
        self.loads: list[Callable[[], None]] = []
        self.paces: dict[str, float] = {}
        self.error: BaseException | None = None
        self._main = threading.Semaphore(0)
        self._local = threading.local()
        self._made: dict[Any, Any] = {}
        self.language, self.names = _language(self)

    @property
    def name(self) -> str:
        """The partition whose code runs."""
        return getattr(self._local, "name", "main")

    def launch(self, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        """Run a kernel's programs."""
        self.programs = programs
        for self.program in range(programs):
            self.partitions, self.loads = {}, []
            self.paces = {kind: self.random.choice(PACES) for kind in ("loads", "products", "stores")}
            self.emulated(kernel)(*args, **constants)

    def emulated(self, function: Any) -> Any:
        """Return a Gluon function as one of Python, whose globals are this machine's."""
        if function not in self._made:
            raw = function.fn
            world = dict(raw.__globals__)
            code = FunctionType(raw.__code__, world, raw.__name__, raw.__defaults__, raw.__closure__)
            self._made[function] = code
            for name, value in raw.__globals__.items():
                if name in raw.__code__.co_names:
                    world[name] = self._replaced(name, value)
        return self._made[function]

    def _replaced(self, name: str, value: Any) -> Any:
        if isinstance(value, constexpr):
            return value.value
        if isinstance(value, GluonJITFunction):
            return self.emulated(value)
        if isinstance(value, ModuleType) and name in ("gl", "tl"):
            return self.language
        return self.names.get(name, value)

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let others run, and go on when `ready`."""
        mine = self.partitions.get(self.name)
        if mine is None:
            check(ready(), f"the kernel's head waits for {waits_for}")
            return
        mine.ready, mine.waits_for = ready, waits_for
        self._main.release()
        mine.baton.acquire()
        if self.error is not None:
            raise SystemExit

    def specialize(self, works: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        """Run the partitions until all have ended."""
        threads = []
        for at, (function, given) in enumerate(works):
            mine = Partition(f"{at} {function.__name__}", self.random.choice(PACES))
            self.partitions[mine.name] = mine
            threads.append(threading.Thread(target=self._run, args=(mine, function, given), daemon=True))
        for thread in threads:
            thread.start()
        while self.error is None and not all(each.ended for each in self.partitions.values()):
            self._advance()
        for mine in self.partitions.values():
            mine.baton.release()
        for thread in threads:
            thread.join(10)
        if self.error is not None:
            raise self.error
        while self.loads:
            self.loads.pop()()
        for mine in self.partitions.values():
            check(not mine.products, f"{mine.name} ends before its products")
            check(not mine.stores, f"{mine.name} ends before its stores have read their memory")

    def _run(self, mine: Partition, function: Callable[..., None], given: tuple[Any, ...]) -> None:
        self._local.name = mine.name
        mine.baton.acquire()
        try:
            if self.error is None:
                function(*given)
        except SystemExit:
            pass
        except BaseException as error:
            self.error = error
        mine.ended = True
        self._main.release()

    def _advance(self) -> None:
        """Do one thing that can happen now: a partition's next step, or something asynchronous."""
        steps: list[tuple[float, Callable[[], None]]] = []
        for mine in self.partitions.values():
            if not mine.ended and mine.ready():
                steps.append((mine.pace, lambda mine=mine: self._step(mine)))
            if mine.products and any(each.value is None for each in mine.products):
                steps.append((self.paces["products"], lambda mine=mine: self._multiply(mine)))
            if mine.stores:
                steps.append((self.paces["stores"], mine.stores[0]))
        steps += [(self.paces["loads"], act) for act in self.loads]
        if not steps:
            waiting = {each.name: each.waits_for for each in self.partitions.values() if not each.ended}
            self.error = WrongKernelError(f"all wait: {waiting}")
            return
        try:
            _, act = self.random.choices(steps, [pace for pace, _ in steps])[0]
            act()
        except WrongKernelError as error:
            self.error = error

    def _step(self, mine: Partition) -> None:
        mine.baton.release()
        self._main.acquire()

    @staticmethod
    def _multiply(mine: Partition) -> None:
        """Run the oldest product that has not run."""
        first = next(each for each in mine.products if each.value is None)
        first.value = first.run()

    def once(self, queue: list[Callable[[], None]], act: Callable[[], None]) -> None:
        """Put `act` in a queue of things that happen once."""

        def run() -> None:
            queue.remove(run)
            act()

        queue.append(run)
        self.pause()


def _language(machine: Machine) -> tuple[Any, dict[str, Any]]:
    """Return what Gluon's module is here, and its functions that kernels import by name."""
    shared: list[list[tuple[str, int, int]]] = []

    def value(x: Any) -> Any:
        check(not isinstance(x, Product), "a product's result is read before it was waited for")
        return x

    def either(f: Any, g: Any) -> Callable[[Any, Any], Any]:
        def run(a: Any, b: Any) -> Any:
            a, b = value(a), value(b)
            if isinstance(a, Tensor) or isinstance(b, Tensor):
                return f(torch.as_tensor(a, dtype=getattr(b, "dtype", None)), torch.as_tensor(b))
            return g(a, b)

        return run

    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if dtype == torch.int64:
            bars = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda at: bars[at])
        shared.append([])
        return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype), shared[-1], machine)

    def init(bar: Barrier, count: int) -> None:
        bar.count = bar.left = count

    def expect(bar: Barrier, size: int) -> None:
        bar.arrive(expected=size)
        machine.pause()

    def arrive(bar: Barrier, count: int = 1) -> None:
        bar.arrive(count)
        machine.pause()

    def load(desc: Descriptor, at: Sequence[int], bar: Barrier, target: Shared) -> None:
        def run() -> None:
            outer, inner = desc.region(at)
            tile = torch.zeros(desc.block, dtype=desc.dtype)
            tile[inner] = desc.base[outer]
            target.data.copy_(tile)
            bar.bytes -= desc.block_type.nbytes
            bar.settle()

        check(target.data.shape == torch.Size(desc.block), "a tile of another shape than its memory")
        machine.once(machine.loads, run)

    def out(adds: bool) -> Callable[..., None]:
        def start(desc: Descriptor, at: Sequence[int], source: Shared) -> None:
            def run() -> None:
                outer, inner = desc.region(at)
                tile = source.for_copies()[inner]
                desc.base[outer] = desc.base[outer] + tile if adds else tile

            check(source.data.shape == torch.Size(desc.block), "a tile of another shape than its memory")
            machine.once(machine.partitions[machine.name].stores, run)

        return start

    def store_wait(left: int) -> None:
        mine = machine.partitions[machine.name]
        while len(mine.stores) > left:
            mine.stores[0]()
        machine.pause()

    def multiply(
        a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False, **_: Any
    ) -> Any:
        acc = value(acc)

        def run() -> Tensor:
            left = a.for_copies() if isinstance(a, Shared) else a
            check(left.dtype == b.dtype, f"{left.dtype} times {b.dtype}")
            made = left.float() @ b.for_copies().float()
            return made + acc if use_acc else made

        product, mine = Product(run), machine.partitions[machine.name]
        mine.products.append(product)
        machine.pause()
        return product if is_async else multiply_wait(0, [product])

    def multiply_wait(left: int, deps: Sequence[Product]) -> Any:
        mine = machine.partitions[machine.name]
        while len(mine.products) > left:
            if mine.products[0].value is None:
                machine._multiply(mine)
            mine.products.pop(0)
        check(not any(each in mine.products for each in deps), "a product is read that was not waited for")
        machine.pause()
        return deps[0].value if len(deps) == 1 else tuple(each.value for each in deps)

    def fence() -> None:
        for each in shared:
            each[:] = [part for part in each if part[0] != machine.name]
        machine.pause()

    def wait(bar: Barrier, phase: int) -> None:
        machine.pause(lambda: bar.passed(phase), f"phase {phase} of a barrier")

    def nothing(*_: Any, **__: Any) -> None:
        """Layouts and the barrier of one partition's threads mean nothing here."""

    language = SimpleNamespace(
        float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16, int64=torch.int64, int32=torch.int32,
        constexpr=constexpr, static_range=range, cdiv=lambda a, b: -(-a // b), where=where,
        minimum=either(torch.minimum, min), maximum=either(torch.maximum, max),
        max=lambda x, axis: value(x).amax(axis), sum=lambda x, axis: value(x).sum(axis),
        exp2=lambda x: torch.exp2(value(x)), log2=lambda x: torch.log2(value(x)),
        arange=lambda first, last, layout=None: torch.arange(first, last),
        full=lambda shape, x, dtype, layout=None: torch.full(tuple(shape), x, dtype=dtype),
        convert_layout=lambda x, layout: value(x),
        load=lambda at, mask=None, other=None: at.read(mask, other),
        store=lambda at, x, mask=None: at.write(x, mask),
        program_id=lambda axis: machine.program, num_programs=lambda axis: machine.programs,
        allocate_shared_memory=allocate, warp_specialize=machine.specialize,
        NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing, NVMMASharedLayout=nothing,
    )  # fmt: skip
    barriers = {"MBarrierLayout": nothing, "init": init, "expect": expect, "arrive": arrive, "wait": wait}
    return language, {
        "mbarrier": SimpleNamespace(**barriers), "tma": SimpleNamespace(store_wait=store_wait),
        "load": load, "store": out(adds=False), "add": out(adds=True), "together": nothing,
        "fence_async_shared": fence, "warpgroup_mma": multiply, "warpgroup_mma_wait": multiply_wait,
    }  # fmt: skip
