"""The table of the model presets' recipes, for the documentation."""

from megatrain.cli.compose import compose
from megatrain.cli.conf import group_options
from megatrain.optim.config import AdamWConfig, MuonConfig
from megatrain.optim.schedule import ConstantConfig

COLUMNS = (
    *(
        "model=",
        "optimizer",
        "peak lr",
        "tokens per step",
        "sequences",
        "seq_len",
        "warm-up",
        "schedule",
        "final ratio",
    ),
    *("weight decay", "betas", "eps", "clip", "tokenizer"),
)


def recipe_table() -> str:
    """Return the recipe of every model preset as a Markdown table, from the composed configs."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for model in group_options()["model"]:
        cfg = compose([f"model={model}"])
        optim, schedule = cfg.optim, cfg.schedule
        assert isinstance(optim, AdamWConfig | MuonConfig)
        assert not isinstance(schedule, ConstantConfig)
        share = schedule.warmup_fraction
        numbers = (
            optim.kind,
            *(f"{optim.lr:g}", f"{cfg.global_batch_size * cfg.seq_len:,}", f"{cfg.global_batch_size:,}"),
            *(
                f"{cfg.seq_len:,}",
                "10 %, at most 100 steps" if share is None else f"{share:.3%}".replace("%", " %"),
            ),
            *(
                schedule.kind,
                f"{schedule.final_ratio:g}",
                f"{optim.weight_decay:g}",
                f"{optim.beta1:g}, {optim.beta2:g}",
            ),
            *(f"{optim.eps:g}", f"{optim.clip_norm:g}", f"{cfg.model.vocab_size:,}"),
        )
        rows.append((f"`{model}`", *numbers))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
