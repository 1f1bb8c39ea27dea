"""A record of what was not read, and why."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

EXAMPLES = 20
"""Names kept of each reason."""
Unit = Literal["file", "row", "document"]


@dataclass(slots=True)
class Group:
    """All that was left out for one reason. `size` is in bytes of the source, where they were counted."""

    unit: Unit
    reason: str
    count: int = 0
    size: int = 0
    examples: list[str] = field(default_factory=list)

    def merge(self, other: "Group") -> None:
        """Add what `other` counted, which comes after this in the order of the corpus."""
        self.count += other.count
        self.size += other.size
        self.examples += other.examples[: EXAMPLES - len(self.examples)]

    def __str__(self) -> str:
        plural = "s" * (self.count != 1)
        return f"{self.count:,} {self.unit}{plural} ({self.reason})"


class LeftOut:
    """A collection of what was left out, by reason. Any split of the work, merged in order, gives the same record."""

    def __init__(self, groups: Iterable[dict[str, Any]] = ()) -> None:
        self._groups = {(group["unit"], group["reason"]): Group(**group) for group in groups}

    def add_file(self, name: str, reason: str, size: int) -> None:
        """Count a file or folder of `size` bytes."""
        self._add(Group("file", reason, 1, size, [name]))

    def add_row(self, name: str, reason: str, size: int = 0) -> None:
        """Count a row of a file, of `size` bytes."""
        self._add(Group("row", reason, 1, size, [name]))

    def add_document(self, name: str, reason: str, size: int) -> None:
        """Count a document whose text, `size` bytes, was read and not used."""
        self._add(Group("document", reason, 1, size, [name]))

    def merge(self, other: "LeftOut") -> None:
        """Add what `other` counted, which comes after this in the order of the corpus."""
        for group in other:
            self._add(group)

    def _add(self, group: Group) -> None:
        known = self._groups.get((group.unit, group.reason))
        if known is None:
            self._groups[group.unit, group.reason] = Group(**asdict(group))
        else:
            known.merge(group)

    def total(self) -> int:
        """Return how many files, rows and documents were left out."""
        return sum(group.count for group in self)

    def __iter__(self) -> Any:
        return iter(self._groups.values())

    def __bool__(self) -> bool:
        return bool(self._groups)

    def as_json(self) -> list[dict[str, Any]]:
        """Return the record as JSON, from which the class can be made again."""
        return [asdict(group) for group in self]

    def summary(self) -> str:
        """Return one line: units and bytes by reason; empty if nothing was left out."""
        return ", ".join(f"{group}{_size(group.size)}" for group in self)

    def details(self) -> str:
        """Return the summary with a few names of each reason."""
        parts = []
        for group in self:
            names = ", ".join(group.examples[:3])
            more = ", ..." if group.count > 3 else ""
            parts.append(f"{group}: {names}{more}")
        return "; ".join(parts)


def _size(size: int) -> str:
    if not size:
        return ""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (1000, "kB")):
        if size >= unit:
            return f" of {size / unit:.3g} {name}"
    return f" of {size} byte{'s' * (size != 1)}"
