"""Check whether a config can resume a run; every key that would change the run is named and refused."""

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase

from megatrain.config.errors import UserError
from megatrain.config.load import flatten
from megatrain.config.schema import shown
from megatrain.nn.plan import decoder_plan
from megatrain.train.config import Config

# Keys that change how a run is sharded, monitored, stored or stopped, but not its results (up to rounding).
FREE = (
    "run.*",
    "log.*",
    "checkpoint.*",
    "parallel.*",
    "engine",
    "deepspeed.*",
    "micro_batch_size",
    "schedule.warmup_fraction",  # warmup_steps, which is derived from it, is compared
    "moe.*",
    "resilience.*",
    "train.stop_at",
    "train.time_budget",
    "train.resume",
    "train.allow_changes",
    "tasks.*",
    "train.eval_every",
    "train.eval_tokens",
    "train.sample_tokens",
    "train.early_stop_patience",
    "data.path",  # the data is compared by its fingerprint instead
    "data.cache_dir",
    "data.prefetch",
    "data.verify",
)


def changed_keys(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Return the keys outside `FREE` whose values differ: key -> (old, new)."""
    before, after = flatten(old), flatten(new)
    free = set(FREE)
    if new.train.precision == "fp8" and new.train.fp8_scaling == "tensor":
        free.remove("micro_batch_size")  # the tokens of a micro-batch share a scale
    keys = [key for key in before | after if not any(fnmatchcase(key, pattern) for pattern in free)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def check_same_run(old: Config, new: Config) -> dict[str, tuple[object, object]]:
    """Refuse changes that `new.train.allow_changes` does not name; return those that it allows.

    Raises:
        UserError: lists every refused key with its old and new value. A key that decides which tensors a checkpoint
            has is refused even if it is allowed.
    """
    changed = changed_keys(old, new)
    if unfit := [key for key in changed if _changes_tensors(key, old, new)]:
        raise UserError(
            f"The checkpoints of run '{new.run.name}' don't fit this config, since these keys decide which tensors a "
            f"checkpoint has:\n{_listed(changed, unfit)}\nRestore the old values, or start another run with "
            "run.name=..."
        )
    allowed = new.train.allow_changes
    refused = {
        key: pair for key, pair in changed.items() if not any(fnmatchcase(key, rule) for rule in allowed)
    }
    if refused:
        raise UserError(
            f"The run '{new.run.name}' was started with another config, and these keys would change its results:\n"
            + _listed(changed, refused)
            + "\nRestore the old values, start another run with run.name=..., or allow the change with "
            + f"'train.allow_changes=[{','.join(refused)}]'."
        )
    return changed


def _listed(changed: dict[str, tuple[object, object]], keys: Iterable[str]) -> str:
    return "\n".join(f"  {key}: was {shown(changed[key][0])}, now {shown(changed[key][1])}" for key in keys)


def _changes_tensors(key: str, old: Config, new: Config) -> bool:
    """Return whether the change of `key` alone gives a checkpoint other tensors, which none can be loaded into."""
    if key in ("model.kind", "optim.kind", "optim.states", "lora.rank", "lora.targets"):
        return True
    if key == "optim.stochastic_rounding":
        return new.optim.kind != "adamw"  # whose updates are counted anyway
    if key == "train.ema_decay":
        return (old.train.ema_decay is None) != (new.train.ema_decay is None)
    if key == "train.precision":
        return "fp64" in (old.train.precision, new.train.precision)
    section, field = key.split(".")[:2] if "." in key else ("", key)
    if section != "model" or old.model.kind != new.model.kind:
        return False
    changed = dataclasses.replace(old.model, **{field: getattr(new.model, field)})
    return decoder_plan(changed) != decoder_plan(old.model)


def check_same_data(old_fingerprint: str, new_fingerprint: str, cfg: Config) -> bool:
    """Refuse changed data in the same run; return True if the data changed and `data.path` is allowed to.

    Raises:
        UserError: the fingerprints differ and `train.allow_changes` does not name `data.path`.
    """
    if old_fingerprint == new_fingerprint:
        return False
    if any(fnmatchcase("data.path", rule) for rule in cfg.train.allow_changes):
        return True
    raise UserError(
        f"The data of run '{cfg.run.name}' has changed since it started (fingerprint {old_fingerprint[:12]}, now "
        f"{new_fingerprint[:12]}), so the run can't continue with the same samples. Restore the data, "
        "start another run with run.name=..., or allow it with 'train.allow_changes=[data.path]'."
    )
