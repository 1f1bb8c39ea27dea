"""The training step against a plain loop written here, in float64; and its cut into micro-batches."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megatrain.data.loader import Loader
from megatrain.data.store import SyntheticStore
from megatrain.models.qwen3.config import Qwen3Config
from megatrain.nn.config import ExpertsConfig
from megatrain.optim.config import AdamWConfig, MuonConfig
from megatrain.parallel.config import ParallelConfig
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.step import train_step

CFG = Config(
    model=Qwen3Config(
        n_layers=2, hidden_size=32, n_heads=4, n_kv_heads=2, ffn_size=48, vocab_size=61, init_std=0.2
    ),
    optim=AdamWConfig(lr=1e-2, clip_norm=0.5),
    train=TrainConfig(precision="fp64", ema_decay=0.9, seed=3),
    seq_len=24,
    global_batch_size=8,
    micro_batch_size=8,
)
STEPS = 4
Result = tuple[list[float], list[float], dict[str, torch.Tensor]]


def loader(cfg: Config) -> Loader:
    return build_loader(cfg, SyntheticStore(cfg.model.vocab_size), None)


def ours(cfg: Config) -> Result:
    state = build_state(cfg, torch.device("cpu"))
    losses, norms = [], []
    for number in range(STEPS):
        batch = loader(cfg).step_batch(number)
        for part in batch.micro_batches:
            part.targets[0, :20] = -100  # micro-batches with unequal numbers of valid tokens
        batch = replace(batch, valid_tokens=sum(int((p.targets >= 0).sum()) for p in batch.micro_batches))
        stats = train_step(state, batch, cfg, lr=cfg.optim.lr)
        losses.append(stats.loss.item())
        norms.append(stats.grad_norm.item())
    return losses, norms, {name: p.detach() for name, p in state.weights.parameters.items()}


def plain(cfg: Config, rows: int) -> Result:
    """The whole batch at once, torch's own AdamW without fusion, logits in full; every `rows`-th row is masked."""
    model = build_state(cfg, torch.device("cpu")).model
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, norms = [], []
    for number in range(STEPS):
        batch = loader(replace(cfg, micro_batch_size=8)).step_batch(number).micro_batches[0]
        targets = batch.targets.clone()
        targets[::rows, :20] = -100
        loss = F.cross_entropy(model(batch.tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in named.items()}


@pytest.mark.parametrize("micro_batch_size", [8, 4, 2])
def test_equals_a_plain_loop_however_it_is_cut(micro_batch_size: int) -> None:
    cfg = replace(CFG, micro_batch_size=micro_batch_size)
    losses, norms, weights = ours(cfg)
    true_losses, true_norms, true_weights = plain(cfg, rows=micro_batch_size)
    # Float64 sums in another order: about 1e-14 a step, and Adam divides by small numbers.
    assert losses == pytest.approx(true_losses, rel=1e-11)
    assert norms == pytest.approx(true_norms, rel=1e-11)
    for name, truth in true_weights.items():
        torch.testing.assert_close(weights[name], truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_experts_train_alike_however_the_batch_is_cut(micro_batch_size: int) -> None:
    """With a balance loss, and with biases that follow the counts of the whole batch."""
    moe = ExpertsConfig(n_experts=4, top_k=2, ffn_size=24, routing="sigmoid", aux_loss=0.1, bias_rate=0.01)
    results = []
    for rows in (8, micro_batch_size):
        cfg = replace(CFG, model=replace(CFG.model, experts=moe), micro_batch_size=rows)
        state = build_state(cfg, torch.device("cpu"))
        losses = []
        for number in range(STEPS):
            batch = loader(cfg).step_batch(number)
            losses.append(train_step(state, batch, cfg, lr=cfg.optim.lr).loss.item())
        assert {block.moe.balance.scale for block in state.model.layers.values()} == {1 / batch.valid_tokens}  # type: ignore[operator, union-attr]
        results.append((losses, {name: t.detach() for name, t in state.tensors().items()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-11)
    for name, truth in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], truth, rtol=1e-9, atol=1e-9)
    bias = results[0][1]["model.layers.1.moe.expert_bias"]
    assert bias.any()
    assert torch.equal((bias / 0.01).round(), (bias / 0.01).round().clamp(-STEPS, STEPS))


def test_experts_go_on_from_the_tensors_of_a_checkpoint() -> None:
    moe = ExpertsConfig(n_experts=4, top_k=2, ffn_size=24, bias_rate=0.05)
    cfg = replace(CFG, model=replace(CFG.model, experts=moe))
    states = [build_state(cfg, torch.device("cpu")) for _ in range(2)]
    for number in range(STEPS):
        if number == 2:  # the second takes up what the first has, and only that
            for name, tensor in states[1].tensors().items():
                tensor.copy_(states[0].tensors()[name])
            states[1].restore(states[0].metadata(), states[1].tensors())
        for state in states[: 1 + number // 2]:
            train_step(state, loader(cfg).step_batch(number), cfg, lr=cfg.optim.lr)
    for name, tensor in states[0].tensors().items():
        assert torch.equal(tensor, states[1].tensors()[name]), name
    assert "model.layers.0.moe.expert_bias" in states[0].tensors()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    changed = replace(CFG, parallel=ParallelConfig(activation_checkpointing=recompute))  # type: ignore[arg-type]
    assert ours(changed)[0] == ours(CFG)[0]


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.filterwarnings("ignore")  # of the tracer, about its own internals
def test_compiled_blocks_train_alike() -> None:
    changed = replace(CFG, parallel=ParallelConfig(compile=True))
    assert ours(changed)[0] == pytest.approx(ours(CFG)[0], rel=1e-10)


def test_bf16_stays_near_float64() -> None:
    """Relative error of a loss near ln 61: bf16 keeps 8 bits, so a few 1e-3."""
    low = replace(CFG, train=replace(CFG.train, precision="bf16"))
    assert ours(low)[0] == pytest.approx(ours(CFG)[0], rel=1e-2)


def test_a_group_takes_its_share_of_the_rate() -> None:
    """Muon's other parameters at ratio 0 stay as they began; its matrices move."""
    cfg = replace(CFG, optim=MuonConfig(lr=1e-2, adamw_lr_ratio=0.0))
    begun = {
        name: p.detach().clone()
        for name, p in build_state(cfg, torch.device("cpu")).weights.parameters.items()
    }
    _, _, ended = ours(cfg)
    stayed = {name for name, weight in ended.items() if torch.equal(weight, begun[name])}
    assert stayed == {
        name for name in begun if begun[name].ndim == 1 or name in ("embed.weight", "head.weight")
    }
