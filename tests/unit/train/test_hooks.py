"""When to evaluate, save and stop."""

from dataclasses import replace

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.train.config import Config, TrainConfig
from megatrain.train.hooks import EarlyStop, IntervalTriggers, Request, StepFacts, StopOnSignal, ask

CFG = Config(train=TrainConfig(steps=10, eval_every=4), checkpoint=CheckpointConfig(every=3))


def requests(cfg: Config) -> dict[int, Request]:
    return {step: IntervalTriggers(cfg).after_step(StepFacts(step=step)) for step in range(1, 11)}


def test_the_timetable() -> None:
    asked = requests(CFG)
    assert [step for step, request in asked.items() if Request.EVALUATE in request] == [4, 8, 10]
    assert [step for step, request in asked.items() if Request.SAVE in request] == [3, 6, 9, 10]
    assert [step for step, request in asked.items() if Request.STOP in request] == [10]


def test_stop_at_saves_and_stops_without_moving_the_end() -> None:
    asked = requests(replace(CFG, train=replace(CFG.train, stop_at=5)))
    assert asked[5] == Request.SAVE | Request.STOP
    assert Request.STOP not in asked[4]


def test_zero_means_only_at_the_end() -> None:
    cfg = Config(train=TrainConfig(steps=10, eval_every=0), checkpoint=CheckpointConfig(every=0))
    assert {step for step, request in requests(cfg).items() if request} == {10}


def test_a_signal_and_lost_patience_save_and_stop() -> None:
    hooks = (StopOnSignal(), EarlyStop())
    assert ask(hooks, StepFacts(step=1)) == Request.NOTHING
    assert ask(hooks, StepFacts(step=1, patience_left=False)) == Request.SAVE | Request.STOP
    assert ask(hooks, StepFacts(step=1, stop_wanted=True)) == Request.SAVE | Request.STOP
