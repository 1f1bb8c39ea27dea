"""torch.compile of each repeated block: one compilation serves all of them."""

from megatrain.nn.contract import Plan
from megatrain.nn.decoder import Decoder
from megatrain.parallel.config import ParallelConfig
from megatrain.parallel.mesh import Mesh


def compile_blocks(model: Decoder, plan: Plan, mesh: Mesh | None, cfg: ParallelConfig) -> None:
    """Compile every block of `model` in place if `cfg.compile` is set; parameter names are unchanged."""
    if cfg.compile:
        for _, block in model.blocks():
            block.compile()
