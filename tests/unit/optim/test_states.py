"""States of 16 and 8 bits: which parameters have them, their bytes, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from optim_roles import ROLES
from torch import nn

from megatrain.config.errors import UserError
from megatrain.config.load import rule_problems
from megatrain.data.config import DataConfig
from megatrain.data.store import SyntheticStore
from megatrain.models.llama3.config import Llama3Config
from megatrain.nn.contract import Role
from megatrain.nn.init import Shard
from megatrain.nn.plan import decoder_plan
from megatrain.optim.build import build_optimizer, optimizer_tensors
from megatrain.optim.config import (
    STATE_BLOCK,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimConfig,
    SGDConfig,
)
from megatrain.optim.step import place_of
from megatrain.parallel.config import ParallelConfig
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.micro_batch import state_bytes
from megatrain.train.resume import check_same_run
from megatrain.train.step import train_step
from megatrain_kernels.dynamic_map import BLOCK
from megatrain_kernels.optimizer.reference import elements

CFG = Config(
    model=Llama3Config(n_layers=2, hidden_size=128, n_heads=4, n_kv_heads=2, ffn_size=384, vocab_size=256),
    data=DataConfig(kind="synthetic"),
    train=TrainConfig(precision="fp32", seed=1),
    seq_len=32,
    global_batch_size=4,
    micro_batch_size=2,
)
KINDS: list[OptimConfig] = [
    AdamWConfig(),
    AdamWConfig(states="bf16"),
    AdamWConfig(states="bf16", stochastic_rounding=True),
    AdamWConfig(states="int8"),
    LionConfig(states="int8"),
    SGDConfig(states="bf16"),
    SGDConfig(momentum=0.0),
    MuonConfig(),
]


def with_optim(optim: OptimConfig, **changes: Any) -> Config:
    return replace(CFG, optim=optim, **changes)


def said(cfg: Config) -> list[str]:
    return [str(problem) for problem in rule_problems(cfg)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("optim", KINDS, ids=lambda optim: f"{optim.kind}-{optim.states}-{optim.lr}")
def test_the_plan_counts_the_bytes_that_are_taken(optim: OptimConfig, precision: Any) -> None:
    """Weights, gradients and the model's copy are counted by hand; the numbers of updates are not counted."""
    cfg = with_optim(optim, train=replace(CFG.train, precision=precision))
    state = build_state(cfg, torch.device("cpu"))
    tensors = optimizer_tensors(state.optimizer, state.weights.trained)
    taken = sum(t.numel() * t.itemsize for name, t in tensors.items() if not name.endswith(".step"))
    count = decoder_plan(cfg.model).n_params()
    rest = count * {"fp32": 8, "bf16": 10, "fp64": 16}[precision]
    assert state_bytes(cfg.model, ParallelConfig(), optim, precision=precision) == rest + taken


def test_bytes_of_a_matrix() -> None:
    """2, 1 and, with a scale of 4 bytes for 128, 1 1/32 bytes for each of AdamW's two states."""
    shape, role = (4096, 1024), Role.COLUMN
    size = 4096 * 1024
    for states, expected in (("fp32", 8 * size), ("bf16", 4 * size), ("int8", 2 * (size + size // 32))):
        assert AdamWConfig(states=states).state_bytes(shape, role, width=4) == expected  # type: ignore[arg-type]
    assert LionConfig(states="int8").state_bytes((64, 130), role, width=4) == 64 * (130 + 2 * 4)


@pytest.mark.parametrize(
    ("shape", "role", "form"),
    [
        ((64, 128), Role.COLUMN, "int8"),
        ((4, 64, 128), Role.EXPERT | Role.ROW, "int8"),
        ((64, 128), Role.HEAD, "int8"),
        ((64, 128), Role.EMBEDDING, "full"),
        ((8192,), Role.NORM, "full"),
        ((31, 128), Role.COLUMN, "full"),
        ((128, 127), Role.COLUMN, "full"),
    ],
)
def test_small_parameters_and_embeddings_keep_full_states(
    shape: tuple[int, ...], role: Role, form: str
) -> None:
    assert AdamWConfig(states="int8").state_format(shape, role) == form
    assert AdamWConfig(states="bf16").state_format(shape, role) == "bf16"
    assert STATE_BLOCK == BLOCK


@pytest.mark.parametrize("optim", KINDS[:6], ids=lambda optim: f"{optim.kind}-{optim.states}-{optim.lr}")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_computes_with_what_the_update_wrote(optim: OptimConfig, precision: Any) -> None:
    cfg = with_optim(optim, train=replace(CFG.train, precision=precision))
    state = build_state(cfg, torch.device("cpu"))
    loader = build_loader(cfg, SyntheticStore(256, n_tokens=1 << 12, documents=20), None)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    losses = [train_step(state, loader.step_batch(0), cfg, lr=1e-3).read()[0] for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, parameter in state.model.named_parameters():
        if parameter.ndim > 1:  # norms near 1 move by less than bf16 can say
            assert not torch.equal(parameter, before[name])
        assert torch.equal(parameter, state.weights.parameters[name].to(parameter.dtype))


def test_a_run_with_random_rounding_is_the_same_each_time() -> None:
    def weights(seed: int) -> torch.Tensor:
        made = nn.Parameter(torch.ones(64, 128))
        cfg = AdamWConfig(states="bf16", stochastic_rounding=True)
        optimizer = build_optimizer(cfg, {"w": made}, ROLES, seed=seed)
        for step in range(3):
            made.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return optimizer.state[made]["exp_avg"].clone()

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("shape", "local", "offsets"),
    [
        ((7, 30), (7, 30), (0, 0)),
        ((7, 30), (2, 30), (5, 0)),
        ((6, 256), (6, 128), (0, 128)),
        ((9, 6, 128), (2, 6, 128), (4, 0, 0)),
        ((9, 6, 128), (2, 3, 128), (4, 3, 0)),
        ((9, 6, 256), (2, 6, 128), (4, 0, 128)),
        ((9, 6, 256), (9, 3, 128), (0, 3, 128)),
        ((4, 3, 5, 5), (2, 3, 5, 5), (2, 0, 0, 0)),
        ((11,), (4,), (7,)),
        ((3, 256), (0, 256), (3, 0)),
    ],
)
@pytest.mark.parametrize("states", ["full", "int8"])
def test_places_number_the_elements_of_the_full_tensor(
    shape: tuple[int, ...], local: tuple[int, ...], offsets: tuple[int, ...], states: Any
) -> None:
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    values = full
    for dim, (size, offset) in enumerate(zip(local, offsets, strict=True)):
        values = values.narrow(dim, offset, size)
    place = place_of(Shard(values, shape, offsets), 5, states)
    rows = values.numel() // place.columns
    found = elements(place, range(rows), range(place.columns), torch.device("cpu"))
    assert torch.equal(found.flatten(), values.flatten())


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (
            with_optim(AdamWConfig(stochastic_rounding=True)),
            "stochastic_rounding=true: needs optim.states=bf16",
        ),
        (with_optim(LionConfig(states="int8", stochastic_rounding=True)), "needs optim.states=bf16"),
        (with_optim(MuonConfig(states="int8")), "optim.states=int8: is not supported by optim=muon"),
        (with_optim(SGDConfig(momentum=0.0, states="bf16")), "without momentum has no states"),
        (
            with_optim(AdamWConfig(states="bf16"), engine="accelerate"),
            "optim.states=bf16: is not supported by engine=accelerate",
        ),
    ],
)
def test_what_has_no_such_states_is_refused(cfg: Config, says: str) -> None:
    assert any(says in line for line in said(cfg)), said(cfg)


def test_a_block_that_tensor_parallelism_would_cut_is_refused() -> None:
    int8 = with_optim(AdamWConfig(states="int8"))
    rule = "must divide the inputs of attn.wo (128), mlp.down (384) into multiples of 128, the blocks of"
    (line,) = said(replace(int8, parallel=ParallelConfig(tp=2)))
    assert line == f"parallel.tp=2: {rule} optim.states=int8. Nearest legal: 1."
    assert not said(int8)
    wide = replace(int8, model=replace(CFG.model, n_heads=8, head_dim=32, ffn_size=512))
    assert not said(replace(wide, parallel=ParallelConfig(tp=2)))
    assert not said(with_optim(AdamWConfig(states="bf16"), parallel=ParallelConfig(tp=2)))


def test_a_run_keeps_its_kind_of_states() -> None:
    old, new = with_optim(AdamWConfig()), with_optim(AdamWConfig(states="int8"))
    allowed = replace(new, train=replace(new.train, allow_changes=("optim.*",)))
    with pytest.raises(UserError, match=r"decide which tensors a checkpoint has:\n  optim.states: was fp32"):
        check_same_run(old, allowed)
