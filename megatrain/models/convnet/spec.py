"""The family of convolutional classifiers."""

from megatrain.models.images import image_spec

SPEC = image_spec("convnet")
