"""`megatrain train`."""

import sys

from megatrain.cli.job import run_in_layout
from megatrain.observe.figures import unbreakable_output
from megatrain.runtime.processes import Processes
from megatrain.train.config import Config

PYTHON_PROMPT = "def "


def run(argv: list[str]) -> int:
    """Compose and check the config, train, and show the result; return the exit code."""
    return run_in_layout("train", argv, argv, _train)


def _train(cfg: Config, processes: Processes) -> int:
    from megatrain.train.main import run as train  # imports torch, so only once the config is valid

    code = train(cfg, processes)
    if cfg.log.display != "off" and processes.is_first:
        with unbreakable_output():  # the run is done and saved, whether or not anyone reads this
            _show_result(cfg, code)
            sys.stdout.flush()
    return code


def _show_result(cfg: Config, code: int) -> None:
    """Print a text sample, the files of the run, and commands to try next."""
    from megatrain.train.files import run_directory

    directory = run_directory(cfg)
    if code:
        print(
            f"\nStopped by a signal; everything is saved in {directory}. Run the same command again to resume."
        )
        return
    prompt = PYTHON_PROMPT if cfg.data.kind == "text" and cfg.data.path is None else ""
    if cfg.train.sample_tokens and cfg.data.kind == "text":
        print("\nA sample of text from the model:\n")
        _print_sample(cfg, prompt)
    quoted = f'"{prompt or "Once"}"'
    print(
        f"\nThe run is in {directory}: metrics.jsonl, events.jsonl, checkpoints/, config.yaml. Try next:\n"
        f"  megatrain generate {directory} {quoted}\n"
        "  megatrain train data.path=FILE_OR_DIRECTORY run.name=mine\n"
        "  megatrain train --help"
    )


def _print_sample(cfg: Config, prompt: str) -> None:
    from megatrain.runtime.device import pick_device
    from megatrain.train.files import run_directory
    from megatrain.train.restore import restore_model
    from megatrain.train.sample import continue_text

    model, tokenizer, _, _ = restore_model(run_directory(cfg), pick_device())
    print(prompt, end="")
    for piece in continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=cfg.train.sample_tokens,
        context=cfg.seq_len,
        temperature=0.7,
        top_k=50,
        seed=cfg.train.seed,
    ):
        print(piece, end="", flush=True)
    print()
