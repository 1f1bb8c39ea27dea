"""From a config to the parts of a run."""

from dataclasses import dataclass

import torch

from megatrain.data.loader import Batch, Loader, validation_batches
from megatrain.data.prepare import Prepared
from megatrain.models.registry import get_spec
from megatrain.nn.init import init_weights
from megatrain.nn.moe import use_experts_backend
from megatrain.optim.build import build_optimizer
from megatrain.optim.ema import WeightAverage
from megatrain.optim.master import MasterWeights
from megatrain.parallel.apply import parallelize
from megatrain.train.config import Config
from megatrain.train.state import TrainState

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Parts:
    """What the loop works with. `state` changes; the rest does not."""

    state: TrainState
    loader: Loader
    eval_batches: list[Batch]


def build_state(cfg: Config, device: torch.device) -> TrainState:
    """The model with its initial weights on `device`, and an optimizer that has done nothing yet.

    Weights are float32 (float64 under `train.precision=fp64`), made in place, never as a whole elsewhere.
    """
    compute_dtype = COMPUTE_DTYPE[cfg.train.precision]
    master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    with torch.device("meta"):
        model = get_spec(cfg.model.kind).build(cfg.model)
    model = model.to(master_dtype).to_empty(device=device)
    init_weights(model, cfg.model, seed=cfg.train.seed)
    use_experts_backend(model, cfg.moe.backend)
    weights = MasterWeights(model, compute_dtype)
    parallelize(model, cfg.parallel)
    optimizer = build_optimizer(cfg.optim, weights.parameters)
    decay = cfg.train.ema_decay
    average = None if decay is None else WeightAverage(weights.parameters, decay)
    return TrainState(model=model, weights=weights, optimizer=optimizer, average=average)


def build_parts(cfg: Config, data: Prepared, device: torch.device) -> Parts:
    """All parts of a run.

    Raises:
        UserError: the data is too short for `seq_len`.
    """
    loader = Loader(
        store=data.train,
        seq_len=cfg.seq_len,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.micro_batch_size,
        seed=cfg.train.seed,
        mask_documents=cfg.data.mask_documents,
        prefetch=cfg.data.prefetch,
    )
    held_out: list[Batch] = []
    if data.val is not None:
        held_out = list(
            validation_batches(
                data.val,
                seq_len=cfg.seq_len,
                tokens=cfg.train.eval_tokens,
                micro_batch_size=cfg.micro_batch_size,
                mask_documents=cfg.data.mask_documents,
            )
        )
    return Parts(state=build_state(cfg, device), loader=loader, eval_batches=held_out)
