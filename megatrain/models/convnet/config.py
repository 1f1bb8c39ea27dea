"""Convolutional classifier of images: blocks of a convolution over patches and a feed-forward part."""

from typing import Literal

from megatrain.config.schema import config
from megatrain.nn.image_config import ConvolutionConfig


@config
class ConvNetConfig(ConvolutionConfig):
    kind: Literal["convnet"] = "convnet"
