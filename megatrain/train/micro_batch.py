"""Choice of the micro-batch size: what a layout allows, and what fits in memory by a simple estimate."""

import math

from megatrain.config.schema import divisors
from megatrain.nn.config import GATED, DecoderConfig
from megatrain.nn.plan import decoder_plan
from megatrain.optim.config import OptimizerConfig
from megatrain.parallel.config import MULTI_STAGE, ParallelConfig
from megatrain.parallel.layout import keeps_float8_codes

USABLE = 0.8
"""Fraction of device memory that the estimate may fill; the rest is for workspaces, fragmentation and all that is not
counted."""
MOST_TOKENS = 65536
"""Tokens per micro-batch beyond which matrix products get no faster."""
ROUNDS = 4
"""Micro-batches per pipeline rank, if there are enough rows: the bubble is then at most a fifth of the time."""


def micro_batch_choices(parallel: ParallelConfig, rows: int) -> list[int]:
    """Return the micro-batch sizes that divide `rows`, a rank's sequences per step, the best first.

    A pipeline wants `ROUNDS` micro-batches for each of its ranks, and some schedules refuse fewer than one or two, and
    other numbers than multiples of `pp`. Where no size satisfies the schedule the only choice is 1, which the layout's
    rules refuse by name.
    """
    sizes = [*reversed(divisors(rows))]
    if parallel.pp == 1:
        return sizes
    if parallel.pp_schedule in MULTI_STAGE:
        least = 2 * parallel.pp if parallel.pp_schedule == "dualpipe_v" else parallel.pp
        sizes = [size for size in sizes if rows // size % parallel.pp == 0 and rows // size >= least]
    return [size for size in sizes if rows // size >= ROUNDS * parallel.pp] or sizes[-1:] or [1]


def largest_fitting(
    choices: list[int],
    model: DecoderConfig,
    parallel: ParallelConfig,
    seq_len: int,
    *,
    optim: OptimizerConfig,
    precision: str,
    memory: int,
) -> int:
    """Return the largest of `choices` whose estimate fits in `memory` (bytes) and `MOST_TOKENS`, else the smallest."""
    room = USABLE * memory - state_bytes(model, parallel, optim, precision=precision)
    sequence = activation_bytes(model, parallel, seq_len, precision=precision)
    limit = max(1, MOST_TOKENS * parallel.cp // seq_len)
    fitting = [size for size in choices if size * sequence <= room and size <= limit]
    return max(fitting, default=min(choices))


def state_bytes(
    model: DecoderConfig, parallel: ParallelConfig, optim: OptimizerConfig, *, precision: str
) -> float:
    """Estimate the bytes a rank holds between steps: weights, gradients and the optimizer's states.

    Weights and gradients are float32, or float64 under fp64. Under bf16 and fp8 the model's own copy of the weights
    comes on top, and under fp8 the codes of the blocks' matrices and of their transposes, where a step keeps them. ZeRO
    (arXiv 1910.02054) shards what its stage says over `dp_shard`.
    """
    plan = decoder_plan(model)
    width = 8 if precision == "fp64" else 4
    copy = 2 if precision in ("bf16", "fp8") else 0
    states = sum(
        optim.state_bytes(shape, plan.roles[name], width=width) for name, shape in plan.shapes.items()
    )
    parameters = plan.n_params()
    parts = {1: width * parameters + states, 2: width * parameters, 3: copy * parameters}
    shards = max(1, parallel.dp_shard)
    each = (size / (shards if parallel.zero_stage >= stage else 1) for stage, size in parts.items())
    codes = 0
    if precision == "fp8" and keeps_float8_codes(parallel):
        matrices = (w for block in plan.blocks for w in block.values() if w.is_product and not w.is_stacked)
        codes = 2 * sum(math.prod(weight.shape) for weight in matrices)
    return (sum(each) + codes) / (parallel.pp * parallel.tp)


def activation_bytes(
    model: DecoderConfig, parallel: ParallelConfig, seq_len: int, *, precision: str
) -> float:
    """Estimate the bytes of one sequence that a rank keeps for the backward pass.

    Counted are the inputs of matrix products, norms, activations and attention, as in Korthikanti et al. (arXiv
    2205.05198, section 4) without dropout and stored attention scores; what tensor parallelism gathers is kept whole.
    With a pipeline, 1F1B and its kin keep as many micro-batches as the pipeline has ranks, so a rank's share of the
    layers cancels.
    """
    size, seq_len = {"fp64": 8, "fp32": 4}.get(precision, 2), model.positions_of(seq_len)
    how = parallel.activation_checkpointing
    layers = [_kept_values(model, layer, how, parallel) for layer in range(model.n_layers)]
    if how == "full":  # one block at a time is recomputed
        layers.append(max(_kept_values(model, layer, "none", parallel) for layer in range(model.n_layers)))
    head = model.hidden_size / parallel.tp + 3 * model.hidden_size
    return (sum(layers) + head) * size * seq_len / parallel.cp


def _kept_values(model: DecoderConfig, layer: int, checkpointing: str, parallel: ParallelConfig) -> float:
    """Count the values that a rank keeps of the block number `layer` for each token of its sequences."""
    hidden = model.hidden_size
    if checkpointing == "full":
        return hidden / parallel.tp  # its input
    queries, values = model.n_heads * model.qk_head_dim, model.n_heads * model.v_head_dim
    keys_values = model.kv_heads * (model.qk_head_dim + model.v_head_dim)
    inner = model.ffn_size
    copies = 0
    if model.experts is not None and model.has_experts(layer):
        copies = model.experts.top_k + model.experts.n_shared_experts
        inner = model.expert_ffn_size * copies
    matrices = 3 if model.activation in GATED else 2  # gate, up and their product; up and its activation
    # Rows of the experts, and the inputs of attention and feed-forward, which see the whole sequence.
    rows = 2 * copies * hidden / (parallel.tp if parallel.ep > 1 else 1)
    sharded = queries + keys_values + values + 2 * hidden
    if checkpointing == "selective":  # the outputs of linear layers and attention
        return (sharded + (matrices - 1) * inner + hidden) / parallel.tp + rows / 2
    return (sharded + matrices * inner) / parallel.tp + 2 * hidden + rows
