"""Config objects as YAML text. PyYAML is imported when it is needed."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from megatrain.config.errors import UserError
from megatrain.config.load import dump, load, upgrade

T = TypeVar("T")


def to_yaml(cfg: Any) -> str:
    """Write all keys with their values, in the classes' order; `from_yaml(type(cfg), to_yaml(cfg)) == cfg`."""
    import yaml

    dumper = _with_plain_exponents(yaml.SafeDumper)  # so that text which looks like a number is quoted
    return yaml.dump(dump(cfg), Dumper=dumper, sort_keys=False, allow_unicode=True, width=110)


def from_yaml(cls: type[T], text: str) -> T:
    """Load a config from YAML; key names of earlier versions are taken for the present ones.

    Raises:
        UserError: the text is not YAML, or not a mapping.
        ConfigError: its values break rules.
    """
    import yaml

    try:
        data = yaml.load(text, Loader=_with_plain_exponents(yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"This config is not valid YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise UserError("This config is not a mapping of keys to values.")
    return load(cls, upgrade(cls, data))


def _with_plain_exponents(base: Any) -> Any:
    """Derive a safe loader or dumper that takes `1e-3` for a number, as YAML 1.2 does (1.1 wants `1.0e-3`)."""
    plain: Any = type(base.__name__, (base,), {})
    number = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")
    plain.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return plain
