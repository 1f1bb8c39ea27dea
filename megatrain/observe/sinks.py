"""Sinks of a step's row: metrics.jsonl, the display, Weights & Biases, TensorBoard."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatrain.observe.config import LogConfig
from megatrain.observe.display import Display
from megatrain.observe.figures import Row
from megatrain.observe.metrics import Interval
from megatrain.observe.rundir import RunLog
from megatrain.runtime.packages import how_to_install, require_package

Sink = Callable[[Row], None]
WANDB = "Weights & Biases"


class Observer:
    """Fans rows out. No sink can end a run: one that fails is reported once and disabled.

    Raises:
        UserError: TensorBoard is asked for and is not installed.
    """

    def __init__(
        self, run_dir: Path, cfg: LogConfig, display: Display, log: RunLog, config: dict[str, Any]
    ) -> None:
        self._every = cfg.every
        self._interval = Interval()
        self._display = display
        self._log = log
        self._sinks: dict[str, Sink] = {}
        self._closers: list[Callable[[], None]] = []
        if cfg.tensorboard:
            self._open_tensorboard(run_dir)
        if cfg.wandb != "off":
            self._sinks[WANDB] = partial(self._first_wandb, run_dir, cfg, config)

    def step(self, row: Row) -> None:
        """Take in one step's row; every `log.every`-th is recorded, and each with a validation.

        Its times and rates are those of all steps since the one before it; everything else is the step's own.
        """
        self._interval.add(row)
        if row["step"] % self._every and "eval/loss" not in row:
            return
        row = row | self._interval.averages()
        self._log.row(row)
        self._display.step(row)
        for name, sink in list(self._sinks.items()):
            self._attempt(name, partial(sink, row))

    def notice(self, text: str) -> None:
        """Show something that a person should know, and keep it in events.jsonl."""
        self._log.event("notice", text=text)
        self._display.notice(text)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show what the model makes of `prompt` after `step` steps, and keep it in events.jsonl."""
        self._log.event("sample", step=step, prompt=prompt, text=text)
        self._display.sample(step, prompt + text)

    def close(self) -> None:
        """Flush and close all sinks."""
        for close in self._closers:
            self._attempt("a log", close)
        self._closers.clear()

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._sinks.pop(name, None)
            self.notice(f"{name} is disabled from here on: {error}")

    def _first_wandb(self, run_dir: Path, cfg: LogConfig, config: dict[str, Any], row: Row) -> None:
        """Open Weights & Biases for the first row: its import and start take seconds, which the first step need not."""
        assert cfg.wandb != "off"
        self._open_wandb(run_dir, cfg.wandb_project, cfg.wandb, config)
        self._sinks[WANDB](row)

    def _open_wandb(
        self, run_dir: Path, project: str, mode: Literal["offline", "online"], config: dict[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError(
                f"the package is not installed ({how_to_install('wandb')}), or set log.wandb=off"
            ) from None
        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        run = wandb.init(
            project=project,
            id=self._log.run_id or None,  # the same after every resume
            name=run_dir.name,
            dir=str(run_dir),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=config,
            settings=settings,
        )
        self._sinks[WANDB] = lambda row: run.log(row, step=row["step"])
        self._closers.append(lambda: run.finish())

    def _open_tensorboard(self, run_dir: Path) -> None:
        require_package("tensorboard", "log.tensorboard=true")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"))

        def write(row: Row) -> None:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    writer.add_scalar(key, value, row["step"])

        self._sinks["TensorBoard"] = write
        self._closers.append(writer.close)
