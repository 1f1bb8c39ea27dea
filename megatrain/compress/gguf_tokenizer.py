"""A tokenizer in a GGUF file: byte-level BPE, which llama.cpp calls gpt2."""

import json
from typing import Any

from megatrain.data.tokenizer import HuggingFaceTokenizer, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens, gguf's `TokenType`."""
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
"""Rule that splits text before merging -> llama.cpp's name for it."""
NEAREST = "llama-bpe"
"""Llama 3's rule, which is nearest to that of tokenizers trained here; indentation is split otherwise."""


def has_tokenizer(tokenizer: Tokenizer) -> bool:
    """Tell whether a GGUF file can have this tokenizer: byte-level BPE alone."""
    return _bpe(tokenizer) is not None


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add vocabulary and merges to the file, or nothing where it can't have this tokenizer.

    Args:
        writer: gguf's `GGUFWriter`. vocab_size: the model's; ids that are no tokens get names.
    """
    found = _bpe(tokenizer)
    if found is None:
        writer.add_tokenizer_model("none")
        return
    names = {number: name for name, number in found["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, NORMAL)
    for added in found["added_tokens"]:
        names[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    numbers = range(vocab_size)
    merges = [each if isinstance(each, str) else " ".join(each) for each in found["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_rule(found))
    writer.add_token_list([names.get(n, f"[PAD{n}]") for n in numbers])
    writer.add_token_types([kinds.get(n, UNUSED) for n in numbers])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)


def _bpe(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return the tokenizer's description if it is byte-level BPE."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    found: dict[str, Any] = json.loads(tokenizer.description())
    is_bytes = "ByteLevel" in json.dumps(found.get("pre_tokenizer"))
    return found if found["model"].get("type") == "BPE" and is_bytes else None


def _split_rule(found: dict[str, Any]) -> str:
    text = json.dumps(found["pre_tokenizer"])
    for rule, name in SPLITS.items():
        if json.dumps(rule)[1:-1] in text:
            return name
    is_plain = found["pre_tokenizer"].get("type") == "ByteLevel" and found["pre_tokenizer"].get("use_regex")
    return "gpt-2" if is_plain else NEAREST
