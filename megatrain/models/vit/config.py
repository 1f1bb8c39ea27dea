"""Vision Transformer (ViT, arXiv 2010.11929): classifies images; LayerNorm, learned positions, GELU, biases."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.image_config import ImageModelConfig


@config
class ViTConfig(ImageModelConfig):
    kind: Literal["vit"] = "vit"
