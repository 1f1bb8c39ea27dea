"""Builds a small model with Megatron Core, computes its logits, and saves it with Megatron's own checkpointing.

python make_megatron.py DIRECTORY [llama|gpt2|qwen3] [TENSOR_PARALLEL]. Needs megatron-core, which this project does not
depend on. Leaves in DIRECTORY a distributed checkpoint in the format torch_dist, and reference.safetensors: tokens, and
the logits that Megatron computes for them.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

VOCAB, PADDED, LENGTH = 300, 320, 64
SHAPE = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_query_groups": 2},
    "qwen3": {"num_query_groups": 2, "kv_channels": 8, "qk_layernorm": True},
    "gpt2": {},
}


def build(kind: str, ranks: int) -> torch.nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    is_gpt2 = kind == "gpt2"
    options = SHAPE | KINDS[kind] | {"use_cpu_initialization": True, "perform_initialization": True}
    options |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "tensor_model_parallel_size": ranks}
    options |= {
        "add_bias_linear": is_gpt2,
        "add_qkv_bias": is_gpt2,
        "layernorm_epsilon": 1e-5 if is_gpt2 else 1e-6,
    }
    options |= {"bias_activation_fusion": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False}
    options |= {
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    if is_gpt2:
        options |= {"normalization": "LayerNorm", "activation_func": gelu_tanh}
    else:
        options |= {
            "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        }  # fmt: skip
    cfg = TransformerConfig(**options)
    spec = get_gpt_layer_local_spec(qk_layernorm=kind == "qwen3", normalization=options["normalization"])
    return GPTModel(
        config=cfg,
        transformer_layer_spec=spec,
        vocab_size=PADDED,
        max_sequence_length=LENGTH,
        position_embedding_type="learned_absolute" if is_gpt2 else "rope",
        share_embeddings_and_output_weights=is_gpt2,
        rotary_base=10000,
    )


def gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(values, approximate="tanh")


def on_cpu() -> None:
    """Let the few lines of Megatron that name the CUDA device name the CPU."""
    from megatron.core.tensor_parallel import random

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    random.CudaRNGStatesTracker.fork = lambda *a, **b: contextlib.nullcontext()  # type: ignore[method-assign]


def write(rank: int, folder: str, kind: str, ranks: int) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from safetensors.torch import save_file

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=ranks
    )
    parallel_state.initialize_model_parallel(ranks)
    on_cpu()
    torch.manual_seed(5)
    model = build(kind, ranks).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shared = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=shared) * 0.1)  # norms and biases too
    tokens = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12)[None]
    mask = torch.ones(12, 12).triu(1).bool()[None, None]
    with torch.no_grad():
        logits = model(tokens, positions, mask)
    if ranks > 1:
        parts = [torch.empty_like(logits) for _ in range(ranks)]
        torch.distributed.all_gather(parts, logits.contiguous())
        logits = torch.cat(parts, -1)
    Path(folder).mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    if rank == 0:
        content = {"tokens": tokens, "logits": logits[..., :VOCAB].contiguous().float()}
        save_file(content, f"{folder}/reference.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(folder: Path, kind: str, ranks: int) -> None:
    mp.spawn(write, (str(folder), kind, ranks), nprocs=ranks)
    Path(f"{folder}.meeting").unlink(missing_ok=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]).resolve(),
        sys.argv[2] if len(sys.argv) > 2 else "llama",
        int(sys.argv[3]) if len(sys.argv) > 3 else 1,
    )
