"""When to evaluate, save and stop."""

from dataclasses import replace

from megatrain.checkpoint.config import CheckpointConfig
from megatrain.train.config import Config, TrainConfig
from megatrain.train.loop import Requests, requests_after

CFG = Config(train=TrainConfig(steps=10, eval_every=4), checkpoint=CheckpointConfig(every=3))


def requests(cfg: Config) -> dict[int, Requests]:
    return {step: requests_after(step, cfg, stop_wanted=False) for step in range(1, 11)}


def test_intervals() -> None:
    asked = requests(CFG)
    assert [step for step, request in asked.items() if request.evaluate] == [4, 8, 10]
    assert [step for step, request in asked.items() if request.save] == [3, 6, 9, 10]
    assert [(step, request.stop) for step, request in asked.items() if request.stop] == [(10, "done")]


def test_stop_at_saves_and_stops_without_moving_the_end() -> None:
    asked = requests(replace(CFG, train=replace(CFG.train, stop_at=5)))
    assert asked[5] == Requests(save=True, stop="stop_at")
    assert not asked[4].stop


def test_zero_means_only_at_the_end() -> None:
    cfg = Config(train=TrainConfig(steps=10, eval_every=0), checkpoint=CheckpointConfig(every=0))
    assert {step for step, request in requests(cfg).items() if request != Requests()} == {10}


def test_a_signal_saves_and_stops() -> None:
    assert requests_after(1, CFG, stop_wanted=True) == Requests(save=True, stop="signal")
    assert requests_after(10, CFG, stop_wanted=True) == Requests(evaluate=True, save=True, stop="signal")
