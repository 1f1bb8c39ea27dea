"""A convolution over the patches of an image, in place of a block's attention."""

from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.nn.attention import SequenceInfo
from megatrain.nn.image_config import ConvolutionConfig
from megatrain.nn.layer import Linear
from megatrain.nn.plan import attention_weights


class Convolution(nn.Module):
    """A convolution over the grid of patches, `(batch, positions, hidden)` to the same; registers get 0."""

    def __init__(self, cfg: ConvolutionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.conv = Linear(attention_weights(cfg)["conv"])

    def forward(self, x: Tensor, sequence: SequenceInfo) -> Tensor:
        rows, columns = self.cfg.patches
        patches = x[:, : rows * columns].transpose(1, 2).unflatten(-1, (rows, columns))
        size = self.cfg.kernel_size
        windows = F.unfold(patches, size, padding=size // 2).transpose(1, 2)
        return F.pad(self.conv(windows), (0, 0, 0, self.cfg.registers))
