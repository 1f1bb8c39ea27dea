"""Command-line flags: a parser for each verb's own flags, and the flags of verbs that take a config (as in Hydra)."""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import NoReturn

from megatrain.config.errors import UserError

FLAGS = (
    (
        "--cfg {job,schema}, -c",
        "print the resolved config (job) or the JSON schema of all keys (schema), and exit",
    ),
    ("--resolve", "accepted as in Hydra; the config is always printed resolved"),
    (
        "--multirun, -m",
        "run every combination of key=a,b,... (also choice(), range(), glob()), each in a new process",
    ),
    (
        "--config-dir DIR, -cd",
        "directory of your own config files (DIR/model/mine.yaml, ...), searched before the built-in ones",
    ),
    ("--config-name NAME, -cn", "the primary config file, without .yaml; default: config"),
)


class Parser(ArgumentParser):
    """argparse for one verb; mistakes raise `UserError`, and the help text comes from the table of verbs."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"megatrain {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        """Refuse the command line; argparse calls this for every mistake.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.verb}: {message}; see `megatrain {self.verb} --help`.")


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line of a verb that takes a config."""

    overrides: list[str]
    cfg: str | None
    multirun: bool
    config_dir: str | None
    config_name: str
    starts_from_base: bool = False
    """Whether model and tokenizer are those of checkpoint.adopt."""


def parse_options(verb: str, argv: list[str]) -> Options:
    """Split a command line into overrides and flags.

    Raises:
        UserError: there is no such flag, or it has a wrong value.
    """
    parser = Parser(verb)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cfg", "-c", choices=["job", "schema"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="config")
    found = parser.parse_intermixed_args(argv)
    starts_from_base = verb == "finetune"
    if starts_from_base and found.overrides and "=" not in found.overrides[0]:
        found.overrides[0] = f"checkpoint.adopt={found.overrides[0]}"
    return Options(
        overrides=found.overrides,
        cfg=found.cfg,
        multirun=found.multirun,
        config_dir=found.config_dir,
        config_name=found.config_name.removesuffix(".yaml"),
        starts_from_base=starts_from_base,
    )
