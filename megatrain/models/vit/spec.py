"""The family of Vision Transformers."""

from megatrain.models.images import image_spec

SPEC = image_spec("vit")
