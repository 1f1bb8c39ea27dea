"""Trains a small Llama of transformers with DeepSpeed, and converts its checkpoint with DeepSpeed's own tool.

python make_universal.py DIRECTORY [ZERO_STAGE]: two processes over gloo. Leaves in DIRECTORY
  like/                   config.json and the weights as transformers writes them, after the last step
  universal/              what ds_to_universal made
  state.safetensors       exp_avg and exp_avg_sq of each parameter, from the optimizer before it was partitioned
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

RANKS, STEPS, VOCAB = 2, 3, 300


def train(rank: int, folder: str, stage: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    cfg = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]
    draw = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (2, 16), generator=draw)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{folder}/saved", tag="last")
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{key}"] = (
                safe_get_full_optimizer_state(parameter, key).clone().view(parameter.shape)
            )
        full = safe_get_full_fp32_param(parameter).clone().view(parameter.shape)
        state[f"{name}.fp32"] = full
    if rank == 0:
        save_file(state, f"{folder}/state.safetensors")
        model.save_pretrained(f"{folder}/like")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def convert(folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=f"{folder}/saved/last",
            output_folder=f"{folder}/universal",
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def main(folder: Path, stage: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(train, (str(folder), stage), nprocs=RANKS)
    convert(str(folder))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCH_EXTENSIONS_DIR"] = cache
        main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
