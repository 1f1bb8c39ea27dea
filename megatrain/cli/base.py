"""What fine-tuning starts from: a run of ours, or a Hugging Face directory, whose model and tokenizer it keeps."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.train.files import CONFIG_FILE, TOKENIZER, read_config

HF_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The model of a base, its tokenizer as values of `data.tokenizer`, and its longest usual sequence in tokens."""

    model: ModelConfig
    tokenizer: dict[str, str]
    seq_len: int
    name: str


def read_base(adopt: str) -> Base:
    """Return what `adopt` holds: a run directory, one of its checkpoints, or a Hugging Face directory.

    Raises:
        UserError: it is none of them, or its model is not supported.
    """
    path = Path(adopt)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if (run / CONFIG_FILE).is_file():
        cfg = read_config(run)
        if cfg.lora.rank:
            raise UserError(
                f"checkpoint.adopt={adopt}: holds adapters alone. Merge them first (megatrain export {run} DIRECTORY "
                "--merge), and fine-tune that directory"
            )
        return Base(cfg.model, _tokenizer(run / TOKENIZER), cfg.seq_len, run.absolute().name)
    if not (path / HF_CONFIG).is_file():
        raise UserError(
            f"checkpoint.adopt={adopt}: must be a run directory ({CONFIG_FILE}), one of its checkpoints/step-..., or a "
            f"Hugging Face directory ({HF_CONFIG})"
        )
    from megatrain.train.import_hf import read_model_config  # imports torch
    from megatrain.train.imported import SEQ_LEN

    model = read_model_config(path)
    tokenizer = {"kind": "huggingface", "path": adopt}
    return Base(model, tokenizer, min(SEQ_LEN, model.max_seq_len), path.absolute().name)


def _tokenizer(directory: Path) -> dict[str, str]:
    """Return the values of `data.tokenizer` that read the tokenizer of a run.

    Raises:
        UserError: the run has none.
    """
    from megatrain.data.tokenizer import META_FILE, RANKS_FILE  # imports numpy

    try:
        kind = json.loads((directory / META_FILE).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} contains no tokenizer ({META_FILE}: {error})") from None
    if kind == "bytes":
        return {"kind": kind}
    return {"kind": kind, "path": str(directory / RANKS_FILE if kind == "tiktoken" else directory)}
