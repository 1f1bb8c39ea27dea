"""The files of one split of a data set, as they are written: tokens, and what stands beside them."""

import json
from array import array
from pathlib import Path

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.store import SPLIT_PARTS, token_dtype


class SplitWriter:
    """A writer of one split in `directory`; a context manager that must be left before the split is read."""

    def __init__(
        self, directory: Path, name: str, *, vocab_size: int, eos_id: int, beside: tuple[str, ...] = ()
    ) -> None:
        self._paths = [directory / f"{name}.{part}" for part in SPLIT_PARTS]
        self._file = open(self._paths[0], "wb")  # noqa: SIM115 - closed by `__exit__`
        self._beside = {part: open(directory / f"{name}.{part}", "wb") for part in beside}  # noqa: SIM115 - likewise
        self._dtype = token_dtype(vocab_size)
        self._vocab_size, self._eos_id = vocab_size, eos_id
        self._starts = array("q")
        self._in_document = False
        self.n_tokens = 0
        self.text_bytes = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *failure: object) -> None:
        for file in (self._file, *self._beside.values()):
            file.close()
        self._paths[1].write_bytes(np.asarray(self._starts, dtype="<i8").tobytes())

    def append(
        self,
        ids: np.ndarray,
        *,
        text_bytes: int,
        ends_document: bool,
        answers: np.ndarray | None = None,
        row: str = "",
        label: int | None = None,
    ) -> None:
        """Append a piece of a document: `ids` `(tokens,)` that encode `text_bytes` bytes of text.

        Args:
            answers: of an example, a document in one piece: `(tokens + 1,)` bool, which tokens, and whether the
                end-of-text token, have a loss. row: name of its row. label: of a labelled document.

        Raises:
            UserError: an id is not below the vocabulary size.
        """
        if len(ids) and int(ids.max()) >= self._vocab_size:
            found = int(ids.max())
            raise UserError(
                f"the tokenizer produced token id {found}, but its vocabulary size is {self._vocab_size}"
            )
        if not self._in_document:
            self._starts.append(self.n_tokens)
        if ends_document:
            ids = np.append(ids, self._eos_id)
        self._file.write(ids.astype(self._dtype).tobytes())
        if "answers" in self._beside and answers is not None:
            self._beside["answers"].write(answers.astype(np.uint8).tobytes())
        if "labels" in self._beside:
            self._beside["labels"].write(np.array(label, dtype="<i8").tobytes())
        if "rows" in self._beside:
            self._beside["rows"].write(json.dumps(row).encode() + b"\n")
        self.n_tokens += len(ids)
        self.text_bytes += text_bytes
        self._in_document = not ends_document

    def counts(self) -> dict[str, int]:
        """Return the entry of this split in the index."""
        return {"tokens": self.n_tokens, "documents": len(self._starts), "text_bytes": self.text_bytes}

    def discard(self) -> None:
        """Delete the files of a closed split."""
        for path in self._paths:
            path.unlink()
