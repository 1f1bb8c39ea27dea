"""Names that other frameworks have for this project's keys, for the answer to a key that does not exist."""

from collections.abc import Mapping

SAME: Mapping[str, tuple[str, ...]] = {
    "run.name": ("name", "run_name", "experiment_name", "exp_name"),
    "run.dir": ("output_dir", "out_dir", "save_dir", "log_dir", "checkpoint_dir", "logdir", "output"),
    "model.n_layers": ("num_layers", "n_layer", "num_hidden_layers", "layers", "depth"),
    "model.hidden_size": (
        "hidden_size",
        "d_model",
        "n_embd",
        "dim",
        "hidden_dim",
        "embed_dim",
        "embedding_dim",
        "width",
    ),
    "model.n_heads": ("n_heads", "num_heads", "n_head", "heads", "num_attention_heads"),
    "model.n_kv_heads": ("n_kv_heads", "num_kv_heads", "num_key_value_heads", "num_query_groups", "kv_heads"),
    "model.head_dim": ("head_dim", "head_size", "d_head", "kv_channels"),
    "model.ffn_size": (
        "ffn_size",
        "intermediate_size",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "ffn_hidden_size",
        "mlp_dim",
    ),
    "model.vocab_size": ("vocab_size", "padded_vocab_size"),
    "model.max_seq_len": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "model.norm_eps": ("norm_eps", "rms_norm_eps", "layer_norm_eps", "layernorm_epsilon"),
    "model.rope_theta": ("rope_theta", "rope_base", "rotary_base"),
    "model.tie_embeddings": ("tie_embeddings", "tie_word_embeddings", "weight_tying"),
    "model.sliding_window": ("sliding_window", "window_size", "attention_window"),
    "model.experts.n_experts": ("num_experts", "n_experts", "num_local_experts"),
    "model.experts.top_k": ("num_experts_per_tok", "moe_top_k", "moe_router_topk"),
    "data.path": ("dataset", "dataset_path", "data_path", "data_dir", "train_file", "train_data", "input"),
    "data.tokenizer.kind": ("tokenizer", "tokenizer_type"),
    "data.tokenizer.path": ("tokenizer_path", "tokenizer_name", "tokenizer_model", "tokenizer_file"),
    "data.val_fraction": ("val_split", "validation_split", "val_ratio", "test_size"),
    "data.cache_dir": ("cache_dir", "cache"),
    "data.prefetch": ("num_workers", "dataloader_num_workers", "prefetch_factor"),
    "optim": ("optimizer", "opt", "optimizer_type"),
    "optim.lr": ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optim.weight_decay": ("weight_decay", "wd", "l2"),
    "optim.clip_norm": (
        "clip_norm",
        "grad_clip",
        "clip_grad",
        "max_grad_norm",
        "gradient_clip_val",
        "gradient_clipping",
    ),
    "optim.beta1": ("beta1", "adam_beta1", "beta_1"),
    "optim.beta2": ("beta2", "adam_beta2", "beta_2"),
    "optim.eps": ("eps", "epsilon", "adam_eps", "adam_epsilon"),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule", "lr_decay_style"),
    "schedule.warmup_steps": (
        "warmup",
        "warmup_steps",
        "num_warmup_steps",
        "lr_warmup_steps",
        "warmup_iters",
    ),
    "schedule.warmup_fraction": ("warmup_fraction", "warmup_ratio", "lr_warmup_fraction"),
    "parallel.tp": ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size"),
    "parallel.pp": (
        "pp",
        "pp_size",
        "pipeline_parallel",
        "pipeline_parallel_size",
        "pipeline_model_parallel_size",
    ),
    "parallel.cp": ("cp", "cp_size", "context_parallel", "context_parallel_size", "sp_size"),
    "parallel.ep": ("ep", "ep_size", "expert_parallel", "expert_parallel_size", "expert_model_parallel_size"),
    "parallel.dp_shard": ("dp", "dp_size", "data_parallel", "data_parallel_size", "fsdp", "dp_shard"),
    "parallel.dp_replicate": ("ddp", "dp_replicate"),
    "parallel.zero_stage": ("zero", "zero_stage", "sharding_stage", "zero_optimization"),
    "parallel.pp_schedule": ("pipeline_schedule", "pp_schedule"),
    "parallel.activation_checkpointing": (
        "gradient_checkpointing",
        "activation_checkpoint",
        "recompute_granularity",
    ),
    "parallel.compile": ("compile", "torch_compile"),
    "train.steps": (
        "steps",
        "max_steps",
        "num_steps",
        "n_steps",
        "total_steps",
        "train_steps",
        "train_iters",
        "max_iters",
        "iterations",
        "num_iterations",
        "training_steps",
    ),
    "train.seed": ("seed", "random_seed", "manual_seed"),
    "train.precision": ("precision", "dtype", "torch_dtype", "mixed_precision", "amp", "bf16", "fp16", "fp8"),
    "train.resume": ("resume", "resume_from", "resume_from_checkpoint", "auto_resume"),
    "train.eval_every": ("eval_every", "eval_steps", "eval_interval", "val_check_interval", "eval_freq"),
    "train.ema_decay": ("ema", "ema_decay"),
    "train.early_stop_patience": ("patience", "early_stopping_patience", "early_stopping"),
    "log.every": ("logging_steps", "log_interval", "log_every", "log_every_n_steps", "log_freq"),
    "log.wandb": ("wandb", "use_wandb", "report_to"),
    "log.wandb_project": ("project", "wandb_project", "project_name"),
    "log.tensorboard": ("tensorboard", "tensorboard_dir"),
    "checkpoint.every": (
        "save_every",
        "save_steps",
        "save_interval",
        "checkpoint_interval",
        "save_freq",
        "ckpt_freq",
    ),
    "checkpoint.keep": ("save_total_limit", "keep_last", "max_checkpoints", "keep_latest_k"),
    "seq_len": (
        "sequence_length",
        "seq_length",
        "block_size",
        "context_length",
        "ctx_len",
        "n_ctx",
        "max_length",
        "max_seq_length",
        "context_size",
    ),
    "global_batch_size": (
        "batch_size",
        "train_batch_size",
        "total_batch_size",
        "gbs",
        "effective_batch_size",
    ),
    "micro_batch_size": (
        "micro_batch",
        "mbs",
        "device_batch_size",
        "per_device_batch_size",
        "per_device_train_batch_size",
        "train_micro_batch_size_per_gpu",
    ),
}
"""Key or config group -> what it is called elsewhere."""

PROCESSES = (
    "the number of processes is the product of the degrees: set parallel.dp_shard, parallel.tp, ..., or "
    "parallel.dp_shard=-1 for as many as torchrun starts"
)
BATCHES = "it follows from the batch sizes: set global_batch_size, and micro_batch_size"
EPOCHS = "a run is counted in steps: set train.steps to epochs x tokens of the data / (global_batch_size x seq_len)"
DROPOUT = "models have no dropout; against over-fitting set optim.weight_decay or train.early_stop_patience"
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs"), EPOCHS),
    **dict.fromkeys(
        (
            "gradient_accumulation_steps",
            "gradient_accumulation",
            "grad_accum",
            "grad_accum_steps",
            "accumulate_grad_batches",
        ),
        BATCHES,
    ),
    **dict.fromkeys(
        ("world_size", "num_gpus", "n_gpus", "gpus", "ngpus", "devices", "num_processes", "nproc_per_node"),
        PROCESSES,
    ),
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "hidden_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "dropout_rate",
        ),
        DROPOUT,
    ),
    **dict.fromkeys(
        ("nodes", "num_nodes", "nnodes"), "start with torchrun --nnodes, and set parallel.dp_shard=-1"
    ),
    **dict.fromkeys(("betas", "adam_betas"), "set optim.beta1 and optim.beta2"),
    **dict.fromkeys(
        ("min_lr", "end_lr", "final_lr"), "set schedule.final_ratio, the last rate as a fraction of optim.lr"
    ),
    **dict.fromkeys(
        ("device", "accelerator"), "a GPU is used where PyTorch finds one; CUDA_VISIBLE_DEVICES= hides it"
    ),
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "use_flash_attention", "use_flash_attn"),
        "the fastest attention for the device is chosen",
    ),
}
"""Name of something that has no key of its own -> what to do instead."""

KEY_OF = {alias: key for key, aliases in SAME.items() for alias in aliases}


def advice(path: str) -> str:
    """Return what to say about a key that does not exist, by its last part; empty if the name is not known."""
    name = path.rpartition(".")[2].lower().replace("-", "_")
    if name in INSTEAD:
        return f"there is no such key: {INSTEAD[name]}"
    return f"this key is called {KEY_OF[name]}" if name in KEY_OF else ""
