"""A store that fails on demand, as fsspec's file systems do, and the tiers that tests upload to."""

from typing import Any
from uuid import uuid4

from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):
    """Memory that refuses the next `failures` writes."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own form
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    failures = 0
    writes = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("faulty://", "memory://", 1))

    def _act(self) -> None:
        cls = type(self)
        cls.writes += 1
        if cls.failures > 0:
            cls.failures -= 1
            raise ConnectionError("the store is away")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "w" in mode:
            self._act()
        return super().open(path, mode, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._act()
        super().pipe_file(path, value, mode, **options)


def faulty_url() -> str:
    """The address of an empty tier in a store that can be made to fail."""
    register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.failures = FaultyFileSystem.writes = 0
    return f"faulty://{uuid4().hex}"


def memory_url() -> str:
    """The address of an empty tier in this process."""
    return f"memory://{uuid4().hex}"
