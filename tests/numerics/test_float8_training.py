"""Training with linear layers in fp8: nearly as well as in bf16, resumable, and only where it was asked for."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from megatrain.data.config import DataConfig
from megatrain.data.store import TokenStore
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.layer import Linear
from megatrain.optim.config import AdamWConfig
from megatrain.parallel import float8
from megatrain.parallel.config import ParallelConfig
from megatrain.runtime import device as device_module
from megatrain.runtime.device import choose_precision
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.resume import changed_keys
from megatrain.train.state import TrainState
from megatrain.train.step import evaluation_loss, train_step
from megatrain_kernels import quantize

CPU = torch.device("cpu")
CFG = Config(
    model=Qwen3Config(n_layers=2, hidden_size=64, n_heads=4, n_kv_heads=2, ffn_size=96, vocab_size=64),
    data=DataConfig(kind="synthetic"),
    optim=AdamWConfig(lr=3e-3),
    train=TrainConfig(precision="bf16", seed=3),
    seq_len=128,
    global_batch_size=4,
    micro_batch_size=4,
)
STEPS = 30
SCALINGS = ("tensor", "row", "block")


@cache
def chain() -> TokenStore:
    """Tokens of which each is, nine times in ten, one of two that its predecessor chooses."""
    generator = np.random.default_rng(7)
    followers = generator.integers(64, size=(64, 2))
    tokens = np.zeros(1 << 15, dtype=np.int64)
    for place in range(1, len(tokens)):
        likely = followers[tokens[place - 1], generator.integers(2)]
        tokens[place] = likely if generator.random() < 0.9 else generator.integers(64)
    return TokenStore(tokens, np.zeros(1, dtype=np.int64), "chain", 0)


def in_fp8(scaling: Any, cfg: Config = CFG) -> Config:
    return replace(cfg, train=replace(cfg.train, precision="fp8", fp8_scaling=scaling))


def steps(state: TrainState, cfg: Config, numbers: range) -> list[float]:
    loader = build_loader(cfg, chain(), None)
    return [train_step(state, loader.step_batch(n), cfg, lr=cfg.optim.lr).loss.item() for n in numbers]


def trained(cfg: Config) -> tuple[list[float], dict[str, Tensor]]:
    state = build_state(cfg, CPU)
    return steps(state, cfg, range(STEPS)), state.tensors()


@pytest.mark.slow
def test_fp8_learns_nearly_what_bf16_learns() -> None:
    """Of the drop of the loss from its start, the mean of the last ten steps differs by less than 1 %.

    Weights and activations have 3 bits, gradients 2: errors of 6 and 12 % of each number, which average out.
    """
    low, _ = trained(CFG)
    start, end = low[0], sum(low[-10:]) / 10
    assert end < start - 2, "it learns"
    for scaling in SCALINGS:
        losses, tensors = trained(in_fp8(scaling))
        assert all(tensors[name].dtype == torch.float32 for name in tensors if name.startswith("model."))
        assert losses != low
        assert losses[0] == pytest.approx(start, rel=1e-2)
        assert abs(sum(losses[-10:]) / 10 - end) < 0.01 * (start - end)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_run_goes_on_bitwise(scaling: str) -> None:
    cfg = in_fp8(scaling)
    whole, taken_up = build_state(cfg, CPU), build_state(cfg, CPU)
    steps(whole, cfg, range(2))
    for name, tensor in taken_up.tensors().items():
        tensor.copy_(whole.tensors()[name])
    taken_up.restore(whole.metadata(), taken_up.tensors())
    assert steps(whole, cfg, range(2, 4)) == steps(taken_up, cfg, range(2, 4))
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, taken_up.tensors()[name]), name


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kept_codes_change_no_bit_of_a_run(
    scaling: str, checkpointing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights quantized once for two micro-batches: losses, weights and their average, with validations between."""
    cfg = in_fp8(scaling, replace(CFG, micro_batch_size=2))
    parallel = ParallelConfig(activation_checkpointing=checkpointing)
    cfg = replace(cfg, parallel=parallel, train=replace(cfg.train, ema_decay=0.5))

    def run() -> tuple[list[float], dict[str, Tensor], int]:
        state, losses, calls = build_state(cfg, CPU), list[float](), list[Any]()
        monkeypatch.setattr(float8, "quantize", lambda x, **how: calls.append(x) or quantize(x, **how))
        for n in range(3):
            losses += steps(state, cfg, range(n, n + 1))
            (part,) = (
                build_loader(replace(cfg, micro_batch_size=4), chain(), None).step_batch(9).micro_batches
            )
            losses.append(evaluation_loss(state.parallel, part).item())
        return losses, state.tensors(), len(calls)

    losses, tensors, n_calls = run()
    monkeypatch.setattr(float8, "keeps_float8_codes", lambda cfg: False)
    plain_losses, plain, n_plain = run()
    assert n_calls < n_plain
    assert losses == plain_losses
    for name, tensor in tensors.items():
        assert torch.equal(tensor, plain[name]), name


def test_what_computes_in_fp8() -> None:
    def counted(cfg: Config) -> int:
        linears = (module for module in build_state(cfg, CPU).model.modules() if isinstance(module, Linear))
        return sum(module.product is not linear for module in linears)

    assert counted(CFG) == 0
    assert counted(in_fp8("row")) == 2 * 7


def test_fp8_is_never_chosen_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by a GPU that multiplies it fastest."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(device_module, "published_tflops", lambda *_: 1e6)
    assert choose_precision(torch.device("cuda", 0)) == "bf16"


def test_micro_batches_belong_to_the_run_where_they_share_scales() -> None:
    for scaling, named in (("tensor", {"micro_batch_size": (4, 2)}), ("row", {}), ("block", {})):
        cfg = in_fp8(scaling)
        assert changed_keys(cfg, replace(cfg, micro_batch_size=2)) == named


def legal_twin(cfg: Config, field: str, legal: Any) -> Config:
    name = field.rpartition(".")[2]
    if field == name:
        return replace(cfg, **{name: legal})
    return replace(cfg, parallel=replace(cfg.parallel, **{name: legal}))


WIDE = replace(CFG.model, hidden_size=512, n_heads=8, n_kv_heads=4, head_dim=64, ffn_size=512)


@pytest.mark.parametrize(
    ("scaling", "layout", "seq_len", "fields"),
    [
        ("tensor", {"pp": 2}, 128, set()),
        ("tensor", {"dp_replicate": 2, "cp": 2}, 128, {"parallel.dp_replicate", "parallel.cp"}),
        ("tensor", {"dp_shard": 2, "tp": 2}, 128, {"parallel.dp_shard", "parallel.tp"}),
        ("row", {"dp_shard": 2, "cp": 2, "pp": 2}, 100, set()),
        ("row", {"tp": 2}, 128, {"parallel.tp"}),
        ("block", {"dp_shard": 4}, 128, set()),
        ("block", {"dp_shard": 4}, 100, {"seq_len"}),
        ("block", {"cp": 2}, 256, {"seq_len"}),
        ("block", {"cp": 2, "tp": 2}, 512, set()),
        ("block", {"tp": 4}, 128, {"parallel.tp"}),  # the keys of a rank are 64 wide
    ],
)
def test_layouts_that_would_change_scales_are_refused(
    scaling: Any, layout: dict[str, Any], seq_len: int, fields: set[str]
) -> None:
    cfg = replace(CFG, model=WIDE, parallel=ParallelConfig(**layout), seq_len=seq_len, micro_batch_size=1)
    assert not list(cfg.problems())
    found = {problem.field: problem for problem in in_fp8(scaling, cfg).problems()}
    assert set(found) == fields
    for field, problem in found.items():
        for legal in problem.legal:  # those named as legal are
            fixed = legal_twin(cfg, field, legal)
            assert field not in {each.field for each in in_fp8(scaling, fixed).problems()}
