"""Python source, cleaned, as the default run trains on it."""

import io
import tokenize
from collections.abc import Iterator

from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import SourceFile
from megatrain.data.sources.readers import Document


def read_python(file: SourceFile, left_out: LeftOut) -> Iterator[Document]:
    """Yield one Python file, decoded as Python does (PEP 263); files in broken encodings, test data, are left out."""
    with file.open() as stream:
        content = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
        text.encode()  # some codecs give lone surrogates
    except (SyntaxError, UnicodeError, LookupError):
        left_out.add_file(file.name, "undecodable", file.size)
        return
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    clean = "\n".join(line.rstrip() for line in lines).strip("\n")
    if clean:
        yield Document(file.name, f"{clean}\n")
    else:
        left_out.add_file(file.name, "empty", file.size)
