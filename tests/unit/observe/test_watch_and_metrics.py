"""The over-fitting watch on made curves; rates and utilization by hand."""

from pathlib import Path

import pytest
import torch

from megatrain.observe.metrics import peak_memory_gib, reset_peak_memory, throughput
from megatrain.observe.watch import update
from megatrain.runtime.device import Peak


def watch(curve: list[tuple[float, float]]) -> tuple[list[int], dict[str, object]]:
    """Validations at which a notice came, and the last counters."""
    counters: dict[str, object] = {}
    noticed = []
    for step, (train, val) in enumerate(curve):
        counters, notice = update(counters, step=step, train_loss=train, eval_loss=val)
        if notice:
            noticed.append(step)
    return noticed, counters


def test_three_rises_while_training_falls_are_said_once() -> None:
    curve = [(5.0, 5.0), (4.0, 4.0), (3.0, 4.1), (2.0, 4.2), (1.0, 4.3), (0.5, 4.4)]
    noticed, counters = watch(curve)
    assert noticed == [4]
    assert (counters["best"], counters["best_step"], counters["without_best"]) == (4.0, 1, 4)


def test_noise_and_plain_divergence_are_not_over_fitting() -> None:
    assert watch([(5, 5), (4, 4), (3, 4.1), (2, 3.9), (1, 4.0), (0.5, 3.8)])[0] == []
    assert watch([(5, 5), (6, 6), (7, 7), (8, 8), (9, 9)])[0] == []


def test_rates_by_hand() -> None:
    row = throughput(
        1000,
        2.0,
        flops_per_token_full=4e9,
        flops_per_token_causal=3e9,
        peak=Peak(1e12, "measured"),
        devices=2,
    )
    assert row["perf/tokens_per_sec"] == 500
    assert row["perf/tokens_per_sec_per_device"] == 250
    assert row["perf/tflops_per_device"] == pytest.approx(1.0)
    assert row["perf/mfu"] == pytest.approx(1.0)
    assert row["perf/mfu_causal"] == pytest.approx(0.75)


def test_no_utilization_without_a_known_peak() -> None:
    row = throughput(1, 1.0, flops_per_token_full=1, flops_per_token_causal=1, peak=None, devices=1)
    assert not any("mfu" in key for key in row)


def test_memory_grows_with_what_is_held() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(1 << 28, dtype=torch.uint8)
    assert peak_memory_gib(torch.device("cpu")) >= before
    assert peak_memory_gib(torch.device("cpu")) > block.numel() / 2**30


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="takes Linux")
def test_the_peak_begins_anew() -> None:
    cpu = torch.device("cpu")
    block = torch.ones(1 << 28, dtype=torch.uint8)
    with_block = peak_memory_gib(cpu)
    del block
    assert peak_memory_gib(cpu) > with_block - 0.01  # it was held once; the system counts in batches of pages
    reset_peak_memory(cpu)
    assert peak_memory_gib(cpu) < with_block - 0.2  # of 0.25 GiB; the rest of the process may grow a little
