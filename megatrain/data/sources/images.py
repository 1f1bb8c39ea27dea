"""Images as documents: each is its bytes, row by row, pixel by pixel, and its label is the name of its folder."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megatrain.data.config import ImagesConfig
from megatrain.data.sources.chat import PARAGRAPHS
from megatrain.data.sources.labelled import RowLabels
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import SourceFile
from megatrain.data.sources.readers import Document
from megatrain.runtime.packages import require_package

DIGITS_FILE = "digits.csv.gz"
"""Name of scikit-learn's handwritten digits: in each row 64 values of 0 to 16, 8 by 8, and the digit."""
DIGITS_SIDE, DIGITS_MOST = 8, 16


class ImageRows(RowLabels):
    """Makes the labelled images of files."""

    def __init__(self, cfg: ImagesConfig) -> None:
        """Prepare to read images in the size and colours of `cfg`.

        Raises:
            UserError: the package Pillow is missing.
        """
        super().__init__("text", None, "label", PARAGRAPHS)
        require_package("PIL", "data=images")
        self.cfg = cfg

    def read(self, stream: BinaryIO, file: SourceFile, left_out: LeftOut) -> Iterator[Document]:
        """Yield the image in a file, or the digits in scikit-learn's; add what is no image to `left_out`.

        A document's text has a character for each byte of the image, that of the same number.
        """
        from PIL import Image, UnidentifiedImageError

        if PurePosixPath(file.name).name == DIGITS_FILE:
            yield from self._digits(stream)
            return
        label = PurePosixPath(file.path).parent.name
        try:
            with Image.open(io.BytesIO(stream.read())) as image:
                found = self._fitted(image)
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            left_out.add_file(file.name, "no image that can be read", file.size)
            return
        if found is None:
            size = f"{self.cfg.width}x{self.cfg.height}"
            left_out.add_file(file.name, f"not {size} pixels (data.images.resize=false)", file.size)
            return
        yield Document(file.name, found.decode("latin-1"), answers=(), label=label)

    def _digits(self, stream: BinaryIO) -> Iterator[Document]:
        from PIL import Image

        lines = io.TextIOWrapper(stream, encoding="ascii")
        for number, row in enumerate(csv.reader(lines), 1):
            *values, digit = (int(float(each)) for each in row)
            grey = bytes(255 * value // DIGITS_MOST for value in values)
            fitted = self._fitted(Image.frombytes("L", (DIGITS_SIDE, DIGITS_SIDE), grey), resize=True)
            assert fitted is not None
            yield Document(f"{DIGITS_FILE}:{number}", fitted.decode("latin-1"), answers=(), label=str(digit))

    def _fitted(self, image: Any, *, resize: bool | None = None) -> bytes | None:
        """Return the bytes of an image in the config's size and colours; None if it has another and may not change."""
        from PIL import Image

        size = (self.cfg.width, self.cfg.height)
        coloured = image.convert("L" if self.cfg.channels == 1 else "RGB")
        if coloured.size != size:
            if not (self.cfg.resize if resize is None else resize):
                return None
            coloured = coloured.resize(size, Image.Resampling.BILINEAR)
        found: bytes = coloured.tobytes()
        return found


def digits_file() -> Path:
    """Return the file with scikit-learn's digits.

    Raises:
        UserError: the package is missing.
    """
    require_package("sklearn", "data=images without data.path")
    import sklearn

    return Path(str(sklearn.__file__)).parent / "datasets" / "data" / DIGITS_FILE
