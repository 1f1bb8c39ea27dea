"""Documents of one file: text, JSON, JSON lines, CSV."""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from megatrain.config.errors import UserError
from megatrain.data.labels import Label
from megatrain.data.sources.chat import NotTextError
from megatrain.data.sources.examples import RowExamples, UnusableRowError
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.rows import RowText, unicode_text
from megatrain.data.sources.streams import decode, lines

DELIMITERS = ",;\t|"


class Document(NamedTuple):
    """One text and its origin: `file`, `file:line` or `file:row`, counted from 1.

    `markup`: special tokens that the text spells are meant as such, since a chat template wrote them. `answers`: the
    spans that have a loss (`examples.Span`); None: all of the text. `label`: of a labelled text. `together`: the texts
    of all documents that stay together, if there are others.
    """

    id: str
    text: str
    markup: bool = False
    answers: tuple[tuple[int, int], ...] | None = None
    label: Label | None = None
    together: str = ""


class Reader(NamedTuple):
    """What all readers need: how a row becomes text, the encoding, and where to note what is left out.

    `is_single_file`: one file is asked for by its name, so that leaving it out would be no answer.
    """

    row_text: RowText
    encoding: str
    left_out: LeftOut
    is_single_file: bool

    def row(self, value: Any, name: str, where: str) -> Iterator[Document]:
        """Yield the document of a row: a mapping, or a text by itself.

        Raises:
            UserError: the row holds no text where it should.
        """
        if isinstance(self.row_text, RowExamples):
            yield from self._examples(self.row_text, value, name, where)
            return
        if isinstance(value, str):
            text: str | None = unicode_text(value, self.row_text.field, where)
        elif isinstance(value, Mapping):
            try:
                text = self.row_text(value, where)
            except NotTextError:
                self.left_out.add_row(name, "conversation with parts that are not text")
                return
        else:
            raise UserError(f"{where} is not a JSON object with a field {self.row_text.field!r}")
        if text:
            yield Document(name, text, isinstance(value, Mapping) and self.row_text.is_markup(value))
        else:
            self.left_out.add_row(name, "null" if text is None else "empty")

    def _examples(self, rows: RowExamples, value: Any, name: str, where: str) -> Iterator[Document]:
        if not isinstance(value, Mapping):
            self.left_out.add_row(name, "not an object with fields")
            return
        try:
            found = rows.examples(value, where)
        except UnusableRowError as error:
            self.left_out.add_row(name, str(error))
            return
        for number, example in enumerate(found, 1):
            part = f"#{number}" if len(found) > 1 else ""
            yield Document(
                name + part,
                example.text,
                example.markup,
                example.answers,
                example.label,
                "\0".join(each.text for each in found) if rows.per_row > 1 else "",
            )


def read_text(stream: BinaryIO, name: str, path: str, reader: Reader) -> Iterator[Document]:
    """Yield the whole file as one document; it gives no examples.

    Raises:
        UserError: it is not in the encoding, or is to give examples, and was asked for by its name.
    """
    content = stream.read()
    if isinstance(reader.row_text, RowExamples):
        if reader.is_single_file:
            raise UserError(
                f"{path} has no rows (JSON lines, JSON, CSV, Parquet, Arrow), so it gives no examples"
            )
        reader.left_out.add_file(name, "without rows", len(content))
        return
    try:
        text = decode(content, path, reader.encoding)
    except UserError:
        if reader.is_single_file:
            raise
        encoding = "UTF-8" if reader.encoding == "auto" else reader.encoding
        reader.left_out.add_file(name, f"not {encoding}", len(content))
        return
    if text:
        yield Document(name, text)
    else:
        reader.left_out.add_file(name, "empty", 0)


def read_jsonl(
    stream: BinaryIO, name: str, path: str, reader: Reader, lines_before: int = 0, offset: int = 0
) -> Iterator[Document]:
    """Yield the document of each line; blank lines are skipped.

    `lines_before` and `offset` (bytes) say where in the file the stream begins.
    """
    return _json_lines(lines(stream, path, reader.encoding, lines_before, offset), name, path, reader)


def _json_lines(
    numbered: Iterable[tuple[int, str]], name: str, path: str, reader: Reader
) -> Iterator[Document]:
    for number, line in numbered:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            # A number of too many digits is answered with advice about Python, after a semicolon.
            said = str(error).partition(";")[0]
            raise UserError(
                f"{where} is not JSON: {said}. A .jsonl file contains one JSON object per line."
            ) from None
        if not isinstance(value, dict):
            raise UserError(f"{where} is not a JSON object with a field {reader.row_text.field!r}")
        yield from reader.row(value, f"{name}:{number}", where)


def read_json(stream: BinaryIO, name: str, path: str, reader: Reader) -> Iterator[Document]:
    """Yield the documents of a `.json` file: lines of objects, an array, or an object.

    Lines are read one at a time; any other form is parsed as a whole, in memory. An object is a row itself if it has
    the field, else it holds the rows: in its only list of objects, or as columns, which pandas writes.
    """
    numbered = lines(stream, path, reader.encoding)
    head = list(itertools.islice((each for each in numbered if each[1].strip()), 1))
    following = next((each for each in numbered if each[1].strip()), None)
    if head and following and _parses(head[0][1]):
        yield from _json_lines(itertools.chain(head, [following], numbered), name, path, reader)
        return
    text = "".join(line for _, line in itertools.chain(head, [following] if following else [], numbered))
    if not text.strip():
        reader.left_out.add_file(name, "empty", len(text))
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error).partition(';')[0]}.") from None
    try:
        rows = _rows(value, reader)
    except KeyError:
        if reader.is_single_file:
            raise reader.row_text.no_field(path, reader.row_text.field, list(value)) from None
        reader.left_out.add_file(name, f"JSON without the field {reader.row_text.field}", len(text))
        return
    for number, row in enumerate(rows, 1):
        yield from reader.row(row, f"{name}:{number}", f"{path}: entry {number}")


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows(value: Any, reader: Reader) -> Iterable[Any]:
    """Return the rows of a parsed file.

    Raises:
        KeyError: it is an object in which there are none; settings of programs look so.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    try:
        reader.row_text.wanted(list(value))
    except KeyError:
        lists = [
            rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
        ]
        if len(lists) != 1:
            raise
        reader.row_text.wanted(list(lists[0][0]))
        return lists[0]
    if not all(isinstance(each, dict) for each in value.values()):
        return [value]
    keys: dict[str, None] = dict.fromkeys(key for column in value.values() for key in column)
    return ({name: column.get(key) for name, column in value.items()} for key in keys)


def read_csv(
    stream: BinaryIO, name: str, path: str, reader: Reader, delimiter: str | None
) -> Iterator[Document]:
    """Yield the document of each row; the first row names the columns.

    `delimiter` None is the one of comma, semicolon, tab and bar that the first row holds most of.
    """
    numbered = lines(stream, path, reader.encoding)
    first = next(numbered, None)
    if first is None:
        reader.left_out.add_file(name, "empty", 0)
        return
    if delimiter is None:
        delimiter = max(DELIMITERS, key=first[1].count)
    csv.field_size_limit(1 << 31)
    table = csv.reader(
        (line for _, line in itertools.chain([first], numbered)), delimiter=delimiter, strict=True
    )
    try:
        columns = next(table)
        try:
            reader.row_text.wanted(columns)
        except KeyError as missing:
            if not reader.is_single_file and missing.args[0] not in columns:
                reader.left_out.add_file(
                    name, f"CSV without the field {missing.args[0]}", sum(map(len, first[1]))
                )
                return
            raise reader.row_text.no_field(path, missing.args[0], columns) from None
        for number, values in enumerate(table, 1):
            if not values:
                continue
            where = f"{path}: row {number}"
            if len(values) != len(columns):
                raise UserError(f"{where} has {len(values)} values, but there are {len(columns)} columns")
            yield from reader.row(dict(zip(columns, values, strict=True)), f"{name}:{number}", where)
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: line {table.line_num}: {error}") from None
