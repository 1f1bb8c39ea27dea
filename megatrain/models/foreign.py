"""Hugging Face's format of a model, with the head that classifies in place of the one that predicts tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatrain.config.errors import UserError
from megatrain.models.config import ModelConfig
from megatrain.models.registry import config_from_hf, get_spec
from megatrain.models.spec import Rule, WeightMap
from megatrain.nn.config import ClassifierConfig
from megatrain.nn.contract import CLASSIFIER

LANGUAGE_MODEL = ("ForCausalLM", "LMHeadModel")
SEQUENCE_CLASSIFIER = "ForSequenceClassification"
"""Ends of the names of transformers' classes; the second ones classify a text at its last token, as we do."""


def weight_map(cfg: ModelConfig) -> WeightMap:
    """Return the names of the model's parameters in transformers.

    Raises:
        UserError: the format can't express the model.
    """
    spec = get_spec(cfg.kind)
    if cfg.classifier is None:
        return spec.weights(cfg)
    mapping = spec.weights(dataclasses.replace(cfg, classifier=None))
    rules = [rule for rule in mapping.rules if rule.ours != ("head.weight",)]
    score = Rule("score.weight", (f"{CLASSIFIER}.weight",))
    return dataclasses.replace(mapping, rules=(*rules, score), repeats={})


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json, without the ids of special tokens.

    Raises:
        UserError: the format can't express the model.
    """
    spec = get_spec(cfg.kind)
    if cfg.classifier is None:
        return spec.hf_config(cfg)
    found = spec.hf_config(dataclasses.replace(cfg, classifier=None))
    (name,) = found["architectures"]
    for end in LANGUAGE_MODEL:
        name = name.removesuffix(end)
    labels = cfg.classifier.labels
    if labels == "auto":
        raise UserError("The classifier's labels are not known yet: it has not been trained")
    return found | {
        "architectures": [f"{name}{SEQUENCE_CLASSIFIER}"],
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
        "problem_type": f"{'multi' if cfg.classifier.multi_label else 'single'}_label_classification",
        "pad_token_id": None,
    }


def model_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the model that a config.json (`hf`, parsed) describes.

    Raises:
        UserError: it is not supported; the message names the key.
    """
    cfg = config_from_hf(hf)
    name = next(iter(hf.get("architectures") or ()), "")
    if not name.endswith(SEQUENCE_CLASSIFIER):
        return cfg
    problem = hf.get("problem_type") or "single_label_classification"
    if problem not in ("single_label_classification", "multi_label_classification"):
        raise UserError(f"config.json: problem_type={problem} is not supported")
    names = hf.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    classifier = ClassifierConfig(labels=labels, multi_label=problem.startswith("multi"))
    made: ModelConfig = dataclasses.replace(cfg, classifier=classifier)
    return made
