"""On a GPU, PyTorch itself says where a training step makes the host wait: nowhere."""

import pytest
import torch

from megatrain.data.config import DataConfig
from megatrain.data.store import SyntheticStore
from megatrain.models.llama3.config import Llama3Config
from megatrain.optim.config import AdamWConfig
from megatrain.train.build import build_loader, build_state
from megatrain.train.config import Config, TrainConfig
from megatrain.train.step import train_step

CFG = Config(
    model=Llama3Config(n_layers=2, hidden_size=256, n_heads=4, n_kv_heads=2, ffn_size=512, vocab_size=1024),
    data=DataConfig(kind="synthetic", mask_documents=True),
    optim=AdamWConfig(lr=1e-3, clip_norm=1.0),
    train=TrainConfig(precision="bf16"),
    seq_len=256,
    global_batch_size=4,
    micro_batch_size=2,
)


@pytest.mark.gpu
def test_a_training_step_never_makes_the_host_wait() -> None:
    cfg = CFG
    state = build_state(cfg, torch.device("cuda"))
    loader = build_loader(cfg, SyntheticStore(1024, n_tokens=1 << 14, documents=64), None)
    for step in range(2):  # kernels are compiled and chosen
        train_step(state, loader.step_batch(step), cfg, lr=1e-3).read()
    batch = loader.step_batch(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stats = train_step(state, batch, cfg, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.read()[0] > 0
