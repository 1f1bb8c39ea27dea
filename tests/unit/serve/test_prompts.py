"""Conversations as prompts, and where their answers end; keys."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatrain.config.errors import UserError
from megatrain.data.config import TokenizerConfig
from megatrain.data.tokenizer import HuggingFaceTokenizer, train_bpe
from megatrain.data.tokenizer_files import read_tokenizer
from megatrain.serve.errors import RefusedError
from megatrain.serve.keys import read_keys
from megatrain.serve.prompts import Prompts
from megatrain.serve.schemas import Message

CHATML = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory whose tokenizer has marks of turns beside its end of text."""
    trained = train_bpe(iter(["the square of the number " * 9]), vocab_size=300)
    inner = trained._inner
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    HuggingFaceTokenizer(inner, eos_id=trained.eos_id, described={"chat_template": CHATML}).save_pretrained(
        tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    return tmp_path


def prompts_of(directory: Path) -> Prompts:
    tokenizer = read_tokenizer(TokenizerConfig(kind="huggingface", path=str(directory)))
    return Prompts(directory, tokenizer, vocab_size=400)


def test_a_chat_prompt_is_transformers(directory: Path) -> None:
    prompts = prompts_of(directory)
    said: list[Any] = [
        {"role": "system", "content": "square"},
        {"role": "user", "content": "the\nnumber" * 2000},
    ]
    found = asyncio.run(prompts.of_chat([Message(**each) for each in said]))
    theirs = AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(found.ids) == expected
    assert prompts.chat_ends == {7, 8, 9, theirs.convert_tokens_to_ids("<|im_end|>")}
    assert prompts.ends == {7, 8, 9}
    assert prompts.chat_stops == ()


def test_messages_that_the_template_refuses(directory: Path) -> None:
    with pytest.raises(RefusedError, match="no developers") as refused:
        asyncio.run(prompts_of(directory).of_chat([Message(role="developer", content="x")]))
    assert refused.value.status == 400


def test_texts_do_not_spell_special_tokens_but_in_conversations(directory: Path) -> None:
    prompts = prompts_of(directory)
    (plain,) = asyncio.run(prompts.of("<|im_end|>"))
    assert len(plain.ids) > 3
    (empty,) = asyncio.run(prompts.of([""]))
    assert empty.ids == (prompts.tokenizer.eos_id,)


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of mine\n\n  0123456789abcdef  \n")
    assert read_keys({}, None) == []
    assert read_keys({"MEGATRAIN_API_KEYS": "a" * 16 + ", " + "b" * 20}, file) == [
        "a" * 16,
        "b" * 20,
        "0123456789abcdef",
    ]
    for text, said in (("# none\n", "no key"), ("short\n", "16 visible"), ("ключ" * 5, "ASCII")):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            read_keys({}, file)
