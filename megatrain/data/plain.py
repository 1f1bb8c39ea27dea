"""Texts that spell a special token are plain text, whatever the tokenizer's model would make of them.

The package `tokenizers` leaves special tokens in a text alone if asked to (`encode_special_tokens`). Two cases
remain: an end token that was added without the mark of a special one, and models that hold special tokens among their
words (Unigram, WordPiece, WordLevel, and BPE with `ignore_merges`), which give the text `</s>` the id of the token
`</s>`.
"""

import json
import re
from typing import Any

import numpy as np

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""Tokens of single bytes, which spell characters outside the vocabulary; trainers mark them as special."""


class PlainText:
    """A check of the texts that `inner` encoded for ids that only the program may insert, and the encoding without."""

    def __init__(self, inner: Any, *, eos_id: int, vocab_size: int) -> None:
        from tokenizers import AddedToken

        added = inner.get_added_tokens_decoder()
        if eos_id in added and not added[eos_id].special:
            inner.add_special_tokens([AddedToken(added[eos_id].content, normalized=False, special=True)])
        inner.encode_special_tokens = True
        self._inner = inner
        self._reserved = np.zeros(vocab_size, dtype=bool)
        special = [i for i, t in added.items() if t.special and not BYTE.fullmatch(t.content)]
        self._reserved[[eos_id, *special]] = True
        self._copy: Any = None
        self._ids = np.empty(0, dtype=np.uint32)

    def checked(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Return `ids` `(tokens,)`, or those of `text` as plain text if a reserved id is among them."""
        if not self._reserved[ids].any():
            return ids
        if self._copy is None:
            self._make_copy()
            if not self._reserved[ids].any():  # it was the token for unknown text
                return ids
        return self._ids[np.array(self.encoding(text).ids, dtype=np.int64)]

    def encoding(self, text: str) -> Any:
        """Return the encoding of a text that `checked` encoded anew; its places are right, its ids the copy's."""
        return self._copy.encode_batch([text], add_special_tokens=False)[0]

    def _make_copy(self) -> None:
        """Make a tokenizer whose model knows the reserved tokens by names that no text spells."""
        state = json.loads(self._inner.to_str())
        model = state["model"]
        scores = [score for _, score in model["vocab"]] if model["type"] == "Unigram" else None
        words = (
            {i: word for i, (word, _) in enumerate(model["vocab"])} if scores else _inverse(model["vocab"])
        )
        unknown = model.get("unk_id")
        self._reserved[[i for i, word in words.items() if i == unknown or word == model.get("unk_token")]] = (
            False
        )
        renamed = {i: f"\uffff{i}\uffff" if self._reserved[i] else word for i, word in words.items()}
        state["post_processor"] = None
        model["vocab"] = (
            [[renamed[i], score] for i, score in enumerate(scores)] if scores else _inverse(renamed)
        )
        self._copy = type(self._inner).from_str(json.dumps(state))
        self._copy.encode_special_tokens = True
        # An added token that the model knew by its name has a new id in the copy, and those after it may have, too.
        moved = {
            i: self._inner.token_to_id(t.content) for i, t in self._copy.get_added_tokens_decoder().items()
        }
        self._ids = np.arange(max([len(self._reserved), *(i + 1 for i in moved)]), dtype=np.uint32)
        self._ids[list(moved)] = list(moved.values())


def _inverse(table: dict[Any, Any]) -> dict[Any, Any]:
    return {value: key for key, value in table.items()}
