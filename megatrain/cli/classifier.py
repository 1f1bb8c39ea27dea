"""The head of a classifier on the command line: a part that a model has only if its data has labels."""

from typing import Any

from hydra.core.override_parser.types import Override

from megatrain.data.config import LABELLED

PREFIX = "model.classifier."


def of_classifier(parsed: list[Override]) -> tuple[dict[str, Any], list[Override]]:
    """Return the values that the overrides give the classifier, by their keys in it, and the other overrides.

    Hydra can't set a key of a part that is null, as the classifier of all presets is.
    """
    own = {
        o.key_or_group.removeprefix(PREFIX): o.value() for o in parsed if o.key_or_group.startswith(PREFIX)
    }
    return own, [o for o in parsed if not o.key_or_group.startswith(PREFIX)]


def with_classifier(data: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of `data`'s model that labelled data makes: a classifier, with the values `given`."""
    is_labelled = isinstance(data.get("data"), dict) and data["data"].get("kind") in LABELLED
    if not given and not is_labelled:
        return {}
    return {"classifier": (data["model"].get("classifier") or {}) | given}
