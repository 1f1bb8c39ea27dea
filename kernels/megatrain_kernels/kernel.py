"""What every operation states about itself, for tests, benchmarks and plans alike."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The least work of one call: FLOPs of its products, and bytes that must cross the device's memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Case:
    """One input of an operation: a name, the tensors' sizes by name, and the call's options."""

    name: str
    sizes: dict[str, int]
    options: dict[str, Any]
