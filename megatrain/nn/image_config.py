"""Config of models that classify images: a decoder's blocks over the patches of an image."""

from collections.abc import Iterator
from typing import Annotated, Literal

from megatrain.config.ranges import Range, Size
from megatrain.config.schema import Problem, config, nearest_divisors
from megatrain.nn.config import DecoderConfig


@config
class ImageModelConfig(DecoderConfig):
    """A classifier of images. Its tokens are an image's bytes, row by row, and one that ends it and has the label."""

    vocab_size: int = 257
    max_seq_len: int = 1 << 20
    positions: Literal["rope", "learned"] = "learned"
    norm: Literal["rms", "layer"] = "layer"
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "gelu"
    attention_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = False
    image_height: Size = 8
    """Height of an image in pixels."""
    image_width: Size = 8
    """Width of an image in pixels."""
    image_channels: Literal[1, 3] = 1
    """Bytes of a pixel: 1 for grey, 3 for red, green and blue."""
    patch_size: Size = 2
    """Side of a patch in pixels; the blocks see a position for each patch."""
    registers: Annotated[int, Range(at_least=1, at_most=1024)] = 4
    """Further positions, of which the last one is classified (Darcet et al., arXiv 2309.16588). With tensor parallelism
    patches and registers together must divide."""

    @property
    def image_bytes(self) -> int:
        """Bytes of an image: its tokens but the last one."""
        return self.image_height * self.image_width * self.image_channels

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_height // self.patch_size, self.image_width // self.patch_size

    @property
    def is_causal(self) -> bool:
        """Whether a position attends to earlier ones alone."""
        return False

    @property
    def n_positions(self) -> int:
        """Positions that the blocks see."""
        rows, columns = self.patches
        return rows * columns + self.registers

    def positions_of(self, seq_len: int) -> int:
        """Return the number of positions of a sample."""
        return self.n_positions

    def problems(self) -> Iterator[Problem]:
        yield from DecoderConfig.problems(
            self
        )  # the decorator makes a new class, which super() does not know
        for name in ("image_height", "image_width"):
            size = getattr(self, name)
            if size % self.patch_size:
                rule = f"must be a multiple of patch_size ({self.patch_size})"
                yield Problem(name, size, rule, nearest_divisors(size, self.patch_size))
        fixed = {
            "vocab_size": 257,
            "positions": "learned",
            "mla": None,
            "sliding_window": None,
            "experts": None,
        }
        for name, value in fixed.items():
            if getattr(self, name) != value:
                yield Problem(name, getattr(self, name), "is not an option of a model of images", (value,))


@config
class ConvolutionConfig(ImageModelConfig):
    """A classifier of images whose blocks have a convolution over neighbouring patches in place of attention."""

    kernel_size: Annotated[int, Range(at_least=1, at_most=63)] = 3
    """Side of the convolution's kernel in patches; odd."""

    def problems(self) -> Iterator[Problem]:
        yield from ImageModelConfig.problems(self)
        if self.kernel_size % 2 == 0:
            size = self.kernel_size
            yield Problem("kernel_size", size, "must be odd, so that it has a middle", (size - 1, size + 1))
