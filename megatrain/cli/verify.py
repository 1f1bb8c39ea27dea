"""`megatrain verify`: compare the results of parallel layouts with those of a single process."""

from megatrain.cli.job import run_job
from megatrain.config.errors import UserError
from megatrain.train.config import Config


def run(argv: list[str]) -> int:
    """Compare the layouts of the config that the command line describes; returns the exit code."""
    fault, rest = _take_fault(argv)
    return run_job("verify", rest, lambda cfg: _verify(cfg, fault))


def _take_fault(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of --fault and the other arguments."""
    if "--fault" not in argv:
        return None, argv
    place = argv.index("--fault")
    value = argv[place + 1] if place + 1 < len(argv) else ""
    return value, argv[:place] + argv[place + 2 :]


def _verify(cfg: Config, fault: str | None) -> int:
    from megatrain.observe.display import (
        make_display,  # imports torch, so only once the config is valid
    )
    from megatrain.train.parity import FAULTS
    from megatrain.train.verify import verify

    if fault is not None and fault not in FAULTS:
        raise UserError(f"--fault {fault}: must be one of {', '.join(FAULTS)}")
    print(
        f"{cfg.model.kind}, shrunk, float64, seed {cfg.train.seed}; errors are relative to one process.",
        flush=True,
    )
    print(
        f"{'layout':34s} {'loss':>8s} {'norm':>8s} {'gradient':>9s} {'weight':>8s}  samples  start  verdict"
    )
    display = make_display("off")
    good = True
    for each in verify(cfg, fault=fault, progress=display.phase):
        good &= each.good
        words = ("same" if each.same_samples else "DIFFER", "same" if each.same_start else "DIFFER")
        print(
            f"{each.layout:34s} {each.loss:8.1e} {each.grad_norm:8.1e} {each.gradient[1]:9.1e} {each.weight[1]:8.1e}  "
            f"{words[0]:7s}  {words[1]:5s}  {'equal' if each.good else f'WRONG, worst in {each.gradient[0]}'}",
            flush=True,
        )
    if fault is not None:
        print(
            "The injected fault was missed in a layout."
            if good
            else f"The injected fault ({fault}) was caught."
        )
        return int(good)
    return 0 if good else 1
