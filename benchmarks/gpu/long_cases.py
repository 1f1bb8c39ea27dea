"""Cases of hundreds of blocks, where the choices that depend on a length are others than in small ones.

They are checked on a GPU only, where their truth takes seconds.
"""

from megatrain_kernels.kernel import Case, sized

_ATTENTION = "batch q_seq k_seq heads kv_heads head_dim v_dim"


def _attention(name: str, seq: int, heads: str, **options: object) -> Case:
    return sized(_ATTENTION, name, f"1 {seq} {seq} {heads}", **options)


LONG: dict[str, list[Case]] = {
    "attention": [
        _attention("causal_32k", 32768, "2 1 128 128"),
        _attention("documents_32k", 32768, "2 1 128 128", documents=29),
        _attention("window_32k", 32768, "2 2 64 64", window=4096),
        _attention("causal_8k", 8192, "4 1 128 128"),
        _attention("causal_8k_64", 8192, "2 2 64 64"),
        _attention("full_8k", 8192, "2 2 128 128", causal=False),
        _attention("documents_8k", 8192, "2 1 128 128", documents=13),
        _attention("documents_8k_64", 8192, "2 2 64 64", documents=13),
        _attention("window_8k", 8192, "2 1 128 128", window=1000),
        _attention("odd_8k", 8191, "2 1 128 128"),
        sized(_ATTENTION, "ring_block_8k", "1 4096 8192 2 1 128 128", q_offset=4096),
        _attention("causal_1k", 1024, "4 4 64 64"),
        _attention("causal_1k_128", 1024, "4 2 128 128"),
        _attention("documents_1k", 1024, "2 2 64 64", documents=7),
        _attention("softcap_1k", 1024, "2 1 256 256", softcap=20.0),
    ],
    "rms_norm": [sized("tokens size", "long", "4096 4096", residual=True)],
    "layer_norm": [sized("tokens size", "long", "8192 1600", residual=True)],
    "bias_gelu": [sized("tokens size", "long", "8192 3072", tanh=True)],
    "optimizer_step": [sized("parameters rows columns", "long", "2 2048 4096", rule="adamw", states="int8")],
    "swiglu": [sized("tokens size", "long", "2048 8192")],
    "geglu": [sized("tokens size", "long", "2048 8192")],
    "rotary": [sized("batch seq heads kv_heads head_dim", "long", "1 8192 8 2 128")],
    "cross_entropy": [
        sized("tokens vocab", "llama3", "256 128256"),
        sized("tokens vocab", "gpt2", "1024 50257"),
    ],
    "linear_cross_entropy": [
        sized("tokens hidden vocab", "llama3", "256 1024 128256"),
        sized("tokens hidden vocab", "gpt2", "2048 768 50257"),
    ],
    "orthogonalize": [sized("batch rows cols", "long", "1 1024 4096")],
    "grouped_gemm": [
        sized("tokens groups in_size out_size", "long", "4096 8 1024 2048"),
        sized("tokens groups in_size out_size", "uneven", "4096 64 512 1408", skew=1.5),
    ],
    "scaled_matmul": [sized("m k n", "long", "2048 4096 2048", a="group", b="block")],
    "quantize": [sized("rows cols", "long", "4096 4096", dtype="e4m3", scaling="group")],
    "dequantize": [sized("rows cols", "long", "4096 4096", dtype="e4m3", scaling="group")],
    "moe_gate": [
        sized(
            "tokens experts top_k",
            "long",
            "8192 256 8",
            scores="sigmoid",
            scale=2.5,
            n_groups=8,
            top_groups=4,
        )
    ],
}
"""By the operation's name."""
