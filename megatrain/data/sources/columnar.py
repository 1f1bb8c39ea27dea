"""Documents of Parquet and Arrow files, a bounded number of rows at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from megatrain.config.errors import UserError
from megatrain.data.sources.readers import Document, Reader
from megatrain.runtime.packages import how_to_install

BATCH_ROWS = 1024


def read_parquet(
    stream: BinaryIO, name: str, path: str, reader: Reader, groups: range | None = None
) -> Iterator[Document]:
    """Yield the documents of a Parquet file, or of its row groups `groups`."""
    import_arrow(path)
    import pyarrow.parquet as pq

    with _readable(path, "Parquet"), pq.ParquetFile(stream) as table:
        columns = _wanted(table.schema_arrow.names, path, reader)
        row = sum(table.metadata.row_group(i).num_rows for i in range(groups.start)) if groups else 0
        chosen = None if groups is None else list(groups)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns, row_groups=chosen):
            yield from _documents(batch, row, name, path, reader)
            row += batch.num_rows


def row_groups(stream: BinaryIO, path: str) -> list[int]:
    """Return the size in bytes of each row group of a Parquet file.

    Raises:
        UserError: the file is damaged.
    """
    import_arrow(path)
    import pyarrow.parquet as pq

    with _readable(path, "Parquet"), pq.ParquetFile(stream) as table:
        metadata = table.metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def read_arrow(stream: BinaryIO, name: str, path: str, reader: Reader) -> Iterator[Document]:
    """Yield the documents of an Arrow file, in the format of files (Feather) or of streams (the package datasets)."""
    pa = import_arrow(path)
    with _readable(path, "Arrow"):
        source = pa.PythonFile(stream, mode="r")
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        columns = _wanted(opened.schema.names, path, reader)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
        row = 0
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS).select(columns)
                yield from _documents(part, row, name, path, reader)
                row += part.num_rows


def import_arrow(path: str) -> Any:
    """Return the package pyarrow.

    Raises:
        UserError: it is missing.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"{path}: reading this format needs pyarrow: {how_to_install('pyarrow')}") from None
    return pa


def _wanted(names: list[str], path: str, reader: Reader) -> list[str]:
    try:
        return reader.row_text.wanted(names)
    except KeyError as missing:
        raise reader.row_text.no_field(path, missing.args[0], names) from None


def _documents(batch: Any, before: int, name: str, path: str, reader: Reader) -> Iterator[Document]:
    for number, row in enumerate(batch.to_pylist(), before + 1):
        yield from reader.row(row, f"{name}:{number}", f"{path}: row {number}")


@contextmanager
def _readable(path: str, kind: str) -> Iterator[None]:
    """Turn an error of pyarrow into a UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a readable {kind} file: {said}") from None
