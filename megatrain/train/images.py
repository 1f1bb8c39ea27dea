"""What images need of the parts of a config together."""

from collections.abc import Iterator

from megatrain.config.schema import Problem
from megatrain.data.config import DataConfig
from megatrain.nn.config import DecoderConfig
from megatrain.nn.image_config import ConvolutionConfig, ImageModelConfig
from megatrain.parallel.config import ParallelConfig


def image_problems(
    model: DecoderConfig, data: DataConfig, parallel: ParallelConfig, seq_len: int
) -> Iterator[Problem]:
    """Yield what a model of images, or data of them, does not go together with."""
    if not isinstance(model, ImageModelConfig):
        if data.kind == "images":
            yield Problem("data.kind", "images", "needs a model of images: model=vit or model=convnet")
        return
    if data.kind != "images":
        yield Problem("data.kind", data.kind, "a model of images needs data=images", ("images",))
    for name in ("height", "width", "channels"):
        ours, theirs = getattr(model, f"image_{name}"), getattr(data.images, name)
        if ours != theirs:
            rule = f"must be model.image_{name} ({ours})"
            yield Problem(f"data.images.{name}", theirs, rule, (ours,))
    if seq_len != model.image_bytes + 1:
        rule = "must be an image's bytes (height x width x channels), and one that has the label"
        yield Problem("seq_len", seq_len, rule, (model.image_bytes + 1,))
    if parallel.cp > 1:
        yield Problem("parallel.cp", parallel.cp, "is not supported for models of images", (1,))
    if parallel.tp > 1 and isinstance(model, ConvolutionConfig):
        rule = "is not supported for a convolutional model, whose positions see their neighbours on all sides"
        yield Problem("parallel.tp", parallel.tp, rule + "; use data parallelism or a pipeline", (1,))
