"""Every preset, built on the meta device, has the published number of parameters."""

from pathlib import Path

import pytest
import torch

from megatrain.cli.compose import compose
from megatrain.models.flops import n_embedding_parameters, n_params
from megatrain.models.registry import get_spec

# Parameters in the safetensors files of the model named in the preset's first line; for GPT-2 as transformers
# counts them (the original paper counts 117M, 345M, 762M and 1542M).
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1_5b": 1_557_611_200,
    "llama3_1b": 1_235_814_400,
    "llama3_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
}
UNPUBLISHED = {"llama3_debug", "small"}
PRESETS = {path.stem for path in (Path(__file__).parents[3] / "conf" / "model").glob("*.yaml")}


def test_every_preset_is_checked() -> None:
    assert PUBLISHED.keys() | UNPUBLISHED == PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_count(name: str) -> None:
    cfg = compose([f"model={name}", "seq_len=128"]).model
    with torch.device("meta"):
        model = get_spec(cfg.kind).build(cfg)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == n_params(cfg)
    assert counted == PUBLISHED.get(name, counted)
    embeddings = sum(p.numel() for n, p in model.named_parameters() if n.endswith("embed.weight"))
    assert embeddings == n_embedding_parameters(cfg)
