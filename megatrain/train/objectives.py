"""The objective that a config asks for, and what it needs before the first step."""

from collections.abc import Iterator

import numpy as np

from megatrain.checkpoint.store import Checkpointer
from megatrain.data.loader import Batch, Loader, ignored_batch
from megatrain.data.store import TokenSource, TokenStore
from megatrain.data.tokenizer import Tokenizer
from megatrain.parallel.apply import ParallelModel
from megatrain.parallel.layout import data_ranks
from megatrain.train.config import Config
from megatrain.train.distill import load_teacher
from megatrain.train.dpo import DPO
from megatrain.train.grpo import GRPO
from megatrain.train.objective import Objective
from megatrain.train.objective_config import DistillConfig, DPOConfig, GRPOConfig
from megatrain.train.state import TrainState


def build_objective(
    cfg: Config,
    parallel: ParallelModel,
    tokenizer: Tokenizer,
    *,
    train: TokenSource,
    val: TokenSource | None,
    checkpointer: Checkpointer | None = None,
) -> Objective | None:
    """Return the objective of `cfg`; None for the cross entropy of the targets. All ranks call this together.

    Args:
        checkpointer: as in `load_teacher`.

    Raises:
        UserError: something that it names is not there.
    """
    if isinstance(cfg.objective, GRPOConfig):
        return GRPO(cfg, parallel, tokenizer)
    if isinstance(cfg.objective, DistillConfig):
        return load_teacher(cfg, parallel, tokenizer, checkpointer)
    if isinstance(cfg.objective, DPOConfig):
        answers, held_out = (
            len(store.document_starts) if isinstance(store, TokenStore) else 0 for store in (train, val)
        )
        return DPO(cfg.objective, answers=answers, held_out=held_out)
    return None


def begin_objective(state: TrainState, loader: Loader, eval_batches: list[Batch]) -> None:
    """Compute what the objective needs of the weights that a run starts from; all ranks call this together."""
    if isinstance(state.objective, DPO):
        parallel = state.parallel
        state.objective.begin(parallel, _all_rows(parallel, loader), _own(parallel, eval_batches))


def _all_rows(parallel: ParallelModel, loader: Loader) -> Iterator[Batch]:
    """Yield each sample once, on one of the data-parallel readers, which yield equally many batches."""
    rows, readers = loader.micro_batch_size, data_ranks(parallel.cfg)
    reader = 0 if parallel.mesh is None else parallel.mesh.data_rank
    own = np.arange(reader, loader.n_samples, readers)
    for first in range(0, -(-loader.n_samples // readers), rows):
        yield loader.rows_batch(own[first : first + rows], rows)


def _own(parallel: ParallelModel, batches: list[Batch]) -> Iterator[Batch]:
    """Yield this reader's share of `batches`, which are the same on all ranks, and empty ones where it has fewer."""
    readers = data_ranks(parallel.cfg)
    reader = 0 if parallel.mesh is None else parallel.mesh.data_rank
    for first in range(0, len(batches), readers):
        yield batches[first + reader] if first + reader < len(batches) else ignored_batch(batches[0])
