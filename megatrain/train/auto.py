"""Resolution of `auto` values, once before the first step."""

import dataclasses
from typing import Any

from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig
from megatrain.engines.config import legal_precisions
from megatrain.nn.config import ClassifierConfig
from megatrain.optim.config import AdamWConfig
from megatrain.parallel.layout import data_ranks
from megatrain.train.config import Config
from megatrain.train.micro_batch import largest_fitting, micro_batch_choices, state_bytes

GIB = 2**30


def resolve_auto(cfg: Config, *, memory: int, before: Config | None = None) -> Config:
    """Return `cfg` with the sizes that are `auto` as numbers; its layout and precision are known.

    Args:
        memory: bytes of a rank's device.
        before: the config of the run that is resumed. Its micro-batch size is kept if the layout and the memory allow
            it, so that results are bit-identical, and always if fp8 scales depend on it.
    """
    steps = cfg.schedule.resolved_warmup(cfg.train.steps)
    if before is not None:
        model: Any = dataclasses.replace(
            cfg.model, classifier=_known_labels(cfg.model.classifier, before.model.classifier)
        )
        cfg = dataclasses.replace(cfg, model=model)
    resolved = dataclasses.replace(
        cfg,
        data=resolve_data(cfg),
        schedule=dataclasses.replace(cfg.schedule, warmup_steps=steps),
    )
    if cfg.micro_batch_size != "auto":
        return resolved
    return dataclasses.replace(resolved, micro_batch_size=_micro_batch(cfg, memory, before))


def with_precision(cfg: Config, precision: str) -> Config:
    """Return `cfg` with `precision` in place of auto, or with the engine's default where it doesn't compute in that."""
    legal = legal_precisions(cfg.engine, cfg.parallel, cfg.deepspeed)
    chosen: Any = precision if precision in legal else legal[0]
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision=chosen))


def resolve_data(cfg: Config) -> DataConfig:
    """Return the data of `cfg` with the size of a tokenizer that is trained as a number."""
    tokenizer = cfg.data.tokenizer
    if tokenizer.vocab_size == "auto":
        tokenizer = dataclasses.replace(tokenizer, vocab_size=cfg.model.vocab_size)
    return dataclasses.replace(cfg.data, tokenizer=tokenizer)


def require_memory(cfg: Config, memory: int) -> None:
    """Refuse a model of which not even the weights and gradients fit in `memory`, the bytes of a rank's device.

    Raises:
        UserError: they don't.
    """
    needed = (
        state_bytes(cfg.model, cfg.parallel, AdamWConfig(), precision=cfg.train.precision) / 2
    )  # without AdamW's moments
    needed /= 2 if cfg.lora.rank else 1  # frozen weights have no gradients
    if needed > memory:
        raise UserError(
            f"The weights and gradients take {needed / GIB:,.1f} GiB per process, but its device has only "
            f"{memory / GIB:.1f} GiB. Use a smaller model, or shard it over more devices (parallel.dp_shard, tp, pp)."
        )


def _micro_batch(cfg: Config, memory: int, before: Config | None) -> int:
    choices = micro_batch_choices(cfg.parallel, cfg.global_batch_size // data_ranks(cfg.parallel))
    precision = cfg.train.precision
    largest = largest_fitting(
        choices,
        cfg.model,
        cfg.parallel,
        cfg.seq_len,
        optim=cfg.optim,
        precision=precision,
        memory=memory,
    )
    if before is None or before.micro_batch_size == "auto":
        return largest
    if precision == "fp8" and cfg.train.fp8_scaling == "tensor":
        return before.micro_batch_size
    return (
        before.micro_batch_size
        if before.micro_batch_size in choices and before.micro_batch_size <= largest
        else largest
    )


def _known_labels(
    classifier: ClassifierConfig | None, before: ClassifierConfig | None
) -> ClassifierConfig | None:
    """Return `classifier` with what the run `before` it has found in place of auto and balanced."""
    if classifier is None or before is None:
        return classifier
    automatic = {"labels": "auto", "multi_label": "auto", "class_weights": "balanced"}
    known = {
        name: getattr(before, name)
        for name, value in automatic.items()
        if getattr(classifier, name) == value and getattr(before, name) is not None
    }
    return dataclasses.replace(classifier, **known)
