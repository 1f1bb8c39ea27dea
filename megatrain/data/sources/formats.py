"""What a file is, by its name and its first bytes."""

from pathlib import PurePosixPath
from typing import Literal

from megatrain.data.sources.streams import MARKS, uncompressed_name

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "tar", "zip"]
BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".tar": "tar",
    **dict.fromkeys((".tgz", ".txz", ".tbz2", ".tzst"), "tar"),
    ".zip": "zip",
}
UNREAD = {
    **dict.fromkeys((".7z", ".rar", ".z", ".lzo", ".br"), "unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as CSV or Parquet"),
    **dict.fromkeys(
        (".avro", ".orc", ".msgpack", ".lance", ".h5", ".hdf5"), "convert it to Parquet or JSON lines"
    ),
    **dict.fromkeys((".sqlite", ".sqlite3", ".db"), "export the table as CSV"),
}
"""Formats of records or archives that are not read, and what to do instead."""
PLAIN = frozenset(
    (
        "",
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".log",
        ".html",
        ".htm",
        ".xml",
        ".py",
        ".c",
        ".h",
        ".cpp",
        ".rs",
        ".js",
        ".java",
    )
)
"""Ends of names that promise text: undecodable bytes in such a file are an error, not a reason to leave it out."""
SNIFF_BYTES = 8192
MAGIC = (
    b"%PDF",
    b"PK\x03\x04",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\xfd7zXZ",
    b"BZh",
)


def format_of(name: str) -> Format:
    """Return the format of a file by its name; an unknown end means text."""
    return BY_SUFFIX.get(suffix_of(name), "text")


def suffix_of(name: str) -> str:
    """Return the end of a name in lower case, without that of its compression."""
    return PurePosixPath(uncompressed_name(name)).suffix.lower()


def full_suffix(name: str) -> str:
    """Return all of a name that decides how the file is read."""
    return name.lower()[len(uncompressed_name(name)) - len(suffix_of(name)) :]


def is_text(head: bytes, suffix: str) -> bool:
    """Return whether a file that begins with `head` is text.

    A NUL byte says that it is not (git has the same rule), unless a byte-order mark explains it. So does the signature
    of a common binary format, and, in a file whose name does not promise text, control characters.
    """
    if any(head.startswith(mark) for mark, _ in MARKS):
        return True
    if b"\0" in head or head.startswith(MAGIC):
        return False
    if suffix in PLAIN:
        return True
    control = sum(byte < 32 and byte not in b"\t\n\r\f\v\x1b\b" for byte in head)
    return control <= len(head) // 50
