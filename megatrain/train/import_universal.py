"""Import of a DeepSpeed universal checkpoint: its weights, and the moments of Adam where it has all of them.

`ds_to_universal` writes one folder for each parameter, under the name that the parameter has in the model:

zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt

Under ZeRO-3 the tensors are flat, and the step number is among DeepSpeed's own objects, which are not read. Only names
of Hugging Face's models are known here. The files are pickles; torch reads them in its restricted mode, which makes
tensors and plain values and runs nothing.
"""

import pickle
from collections.abc import Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.reader import TensorSpec
from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.registry import get_spec
from megatrain.train.config import RunConfig
from megatrain.train.import_hf import map_tensors, read_model_config, weight_specs
from megatrain.train.imported import (
    OPTIMIZER,
    Imported,
    Progress,
    Rows,
    free_directory,
    read_model_tokenizer,
    write_run,
)
from megatrain.train.restore import WEIGHTS

LATEST = "latest_universal"
"""File beside the steps' directories that names the newest."""
ZERO = "zero"
WRAPPERS = ("module.", "_orig_mod.")
"""What wrappers put before a model's own names."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def find_universal(directory: Path) -> Path | None:
    """Return the directory of the universal checkpoint at `directory`, or of the newest one there; None without one."""
    if (directory / ZERO).is_dir():
        return directory
    if (directory / LATEST).is_file():
        named = directory / (directory / LATEST).read_text().strip()
        if (named / ZERO).is_dir():
            return named
    return None


def import_universal(source: Path, like: Path, run: RunConfig, *, progress: Progress) -> Imported:
    """Write the model of a universal checkpoint as a new run, with a checkpoint of step 0.

    Args:
        like: Hugging Face directory of the same architecture, with config.json and the tokenizer; it needs no weights.

    Raises:
        UserError: a file is missing or no tensor, the names are not those of the model, or the run exists.
    """
    free_directory(run)
    model = read_model_config(like)
    tokenizer = read_model_tokenizer(like, model)
    weights = StateFiles(source, "fp32", model)
    tensors = {WEIGHTS + name: pair for name, pair in map_tensors(weights, model).items()}
    trained = _moments(source, model)
    facts: dict[str, object] = {"source": str(source.resolve()), "format": "deepspeed universal"}
    done = write_run(
        run, model, tokenizer, tensors | trained, facts | {"moments": bool(trained)}, progress=progress
    )
    return replace(done, files=len(weights.specs) * (1 + len(MOMENTS) * bool(trained)))


class StateFiles:
    """One state (`fp32`: the weights; `exp_avg`, ...) of every parameter, under Hugging Face's names."""

    def __init__(self, directory: Path, state: str, model: ModelConfig) -> None:
        """Read what is there, but no value.

        Raises:
            UserError: a file is missing or holds no tensor.
        """
        hollow = {name: torch.empty(spec.size, device="meta") for name, spec in weight_specs(model).items()}
        self._shapes = {n: t.shape for n, t in get_spec(model.kind).weights(model).export(hollow).items()}
        self._paths: dict[str, Path] = {}
        for folder in sorted((directory / ZERO).iterdir()):
            if folder.is_dir():
                self._paths[_own_name(folder.name, self._shapes)] = folder / f"{state}.pt"
        self.specs = {}
        for name in self._paths:
            tensor = self._tensor(name)
            self.specs[name] = TensorSpec(tensor.dtype, tensor.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop`; of a tensor without dimensions, all of it."""
        tensor = self._tensor(name)
        return (tensor[start:stop] if tensor.ndim else tensor).clone()

    def _tensor(self, name: str) -> Tensor:
        """Return a tensor in the shape that the model gives it, which is lost under ZeRO-3."""
        tensor, shape = _read_tensor(self._paths[name]), self._shapes.get(name)
        if shape is not None and tensor.ndim == 1 and tensor.numel() == shape.numel():
            return tensor.view(shape)
        return tensor


def _moments(source: Path, model: ModelConfig) -> dict[str, tuple[TensorSpec, Rows]]:
    """Return the state of AdamW in a checkpoint, by its names there; empty if the source does not have all of it."""
    folders = [folder for folder in (source / ZERO).iterdir() if folder.is_dir()]
    if not all((folder / f"{state}.pt").is_file() for folder in folders for state in (*MOMENTS, "step")):
        return {}
    found: dict[str, tuple[TensorSpec, Rows]] = {}
    for state in MOMENTS:
        mapped = map_tensors(StateFiles(source, state, model), model)
        found |= {f"{OPTIMIZER}{name}.{state}": pair for name, pair in mapped.items()}
    steps = {float(_read(folder / "step.pt")) for folder in folders}
    if len(steps) > 1:
        raise UserError(f"{source}: the parameters were updated different numbers of times ({sorted(steps)})")
    step = torch.tensor(steps.pop(), dtype=torch.float32)
    spec = TensorSpec(step.dtype, step.shape)
    names = [name.removesuffix(f".{MOMENTS[0]}") for name in found if name.endswith(f".{MOMENTS[0]}")]
    return found | {f"{name}.step": (spec, partial(_constant, step)) for name in names}


def _constant(value: Tensor, start: int, stop: int) -> Tensor:
    return value


def _own_name(folder: str, known: Container[str]) -> str:
    """Return a parameter's name without what wrappers put before it."""
    name = folder
    while name not in known and (prefix := next((each for each in WRAPPERS if name.startswith(each)), None)):
        name = name.removeprefix(prefix)
    return name


def _read_tensor(path: Path) -> Tensor:
    """Return the tensor in one of DeepSpeed's files, mapped into memory.

    Raises:
        UserError: there is none.
    """
    content = _read(path)
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{path} holds no tensor")
    return tensor


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} can't be read: {str(error).splitlines()[0]}") from None
