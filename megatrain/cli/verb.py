"""What is known of a verb before its file is imported."""

from dataclasses import dataclass
from importlib import import_module
from keyword import iskeyword


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of the command line, `megatrain <name>`."""

    name: str
    summary: str
    """One line for the list of verbs."""
    usage: str
    """Arguments after the verb."""
    examples: tuple[tuple[str, str], ...]
    """Three example command lines, each with what it does."""
    takes_config: bool
    """Whether it takes Hydra overrides and the flags of `cli/options.py`."""
    flags: tuple[tuple[str, str], ...] = ()
    """Flags of this verb alone, each with what it does."""
    actions: tuple[tuple[str, str], ...] = ()
    """Words of which one follows the verb, each with what it does."""

    def run(self, argv: list[str]) -> int:
        """Run the verb; return the exit code of the process."""
        module = f"{self.name}_" if iskeyword(self.name) else self.name
        return int(import_module(f"megatrain.cli.{module}").run(argv))
