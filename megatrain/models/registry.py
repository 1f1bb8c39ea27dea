"""From a config's `kind` to its family, imported when asked for."""

from importlib import import_module

from megatrain.models.spec import ModelSpec

FAMILIES = ("gpt2", "llama3", "qwen3")


def get_spec(kind: str) -> ModelSpec:
    """The family `kind`.

    Raises:
        KeyError: there is none of that name.
    """
    if kind not in FAMILIES:
        raise KeyError(kind)
    spec: ModelSpec = import_module(f"megatrain.models.{kind}.spec").SPEC
    return spec
