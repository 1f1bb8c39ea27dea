"""Measured peaks are kept and only rise; published ones are found by the device's name."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatrain.config.errors import UserError
from megatrain.runtime import device as device_module
from megatrain.runtime.device import (
    PUBLISHED_TFLOPS,
    choose_precision,
    peak_flops,
    pick_device,
    published_tflops,
)

CPU = torch.device("cpu")
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gemm_peaks.json"


def measuring(monkeypatch: pytest.MonkeyPatch, **flops: float) -> None:
    """The next measurements find these numbers."""
    found = {getattr(torch, name): value for name, value in flops.items()}
    monkeypatch.setattr(
        device_module, "_measure", lambda dtypes, *, seconds: {dtype: found[dtype] for dtype in dtypes}
    )


def test_the_peak_of_a_cpu_is_that_of_its_products() -> None:
    """Against a product timed here; other processes on the machine may disturb either by a factor of a few."""
    a = torch.ones(1024, 1024)
    times = []
    for _ in range(10):
        before = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - before)
    peak = peak_flops(CPU, FP32)
    assert peak is not None
    assert peak.how == "measured"
    assert 1 / 8 < peak.flops / (2 * 1024**3 / min(times)) < 8


def test_a_busy_moment_does_not_lower_the_peak(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for now in (100.0, 20.0, 101.0, 150.0):  # noise, then a quieter machine
        measuring(monkeypatch, float32=now)
        peak = peak_flops(CPU, FP32)
        assert peak is not None
        seen.append(peak.flops)
    assert seen == [100, 100, 100, 150]
    assert list(json.loads(cache.read_text()).values()) == [150]


def test_peaks_are_kept_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    measuring(monkeypatch, float32=100.0, bfloat16=400.0)
    peak_flops(CPU, FP32)
    peak_flops(CPU, BF16)
    torch.set_num_threads(threads + 1)
    try:
        measuring(monkeypatch, float32=50.0)
        peak = peak_flops(CPU, FP32)
    finally:
        torch.set_num_threads(threads)
    assert peak is not None
    assert peak.flops == 50
    assert sorted(json.loads(cache.read_text()).values()) == [50, 100, 400]


@pytest.mark.parametrize("text", ['{"half', "[1, 2]", '{"key": "fast"}', ""])
def test_a_damaged_cache_is_written_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    measuring(monkeypatch, float32=100.0)
    assert peak_flops(CPU, FP32) is not None
    assert list(json.loads(cache.read_text()).values()) == [100]


def test_a_cache_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the directory should be")
    measuring(monkeypatch, float32=100.0, bfloat16=500.0)
    assert peak_flops(CPU, FP32) is not None
    assert choose_precision(CPU) == "bf16"


@pytest.mark.parametrize(("bf16", "expected"), [(2.0, "bf16"), (1.1, "fp32"), (0.1, "fp32")])
def test_bf16_is_taken_where_it_is_clearly_faster(
    bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(monkeypatch, bfloat16=bf16, float32=1.0)
    assert choose_precision(CPU) == expected
    monkeypatch.setattr(device_module, "_measure", lambda *_, **__: pytest.fail("measured again"))
    assert choose_precision(CPU) == expected


SLOW_BF16 = """
import time, torch
from megatrain.runtime.device import choose_precision
torch.mm(torch.ones(8, 8), torch.ones(8, 8))
before = time.perf_counter()
print(choose_precision(torch.device("cpu")), time.perf_counter() - before)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction set is limited as x86 names it")
def test_a_cpu_without_bf16_instructions_trains_in_float32_and_knows_it_soon() -> None:
    """There one product of the full shape can take ten seconds."""
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", SLOW_BF16],
        env=os.environ | limited,
        capture_output=True,
        text=True,
        check=True,
    )
    precision, seconds = done.stdout.split()
    assert precision == "fp32"
    assert float(seconds) < 5  # about 0.8 on a quiet machine


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.5),
        ("NVIDIA H100 80GB HBM3", FP8, 1979),
        ("NVIDIA H100 80GB HBM3", FP32, 67),
        ("NVIDIA H100 PCIe", BF16, 756),
        ("NVIDIA H100 NVL", BF16, 835.5),
        ("NVIDIA H200", BF16, 989.5),
        ("NVIDIA GH200 480GB", BF16, 989.5),
        ("NVIDIA B200", BF16, 2250),
        ("NVIDIA GB200", BF16, 2500),
        ("NVIDIA A100-SXM4-80GB", BF16, 312),
        ("NVIDIA A100-PCIE-40GB", FP32, 19.5),
        ("NVIDIA A100-SXM4-40GB", FP8, None),
        ("NVIDIA L40S", BF16, 362),
        ("NVIDIA L40", BF16, 181),
        ("AMD Instinct MI300X", BF16, 1307.4),
        ("NVIDIA GeForce RTX 4090", BF16, 165.2),
        ("NVIDIA GeForce RTX 3090", BF16, 71),
        ("Tesla T4", FP32, 8.1),
        ("Tesla T4", BF16, None),
        # other devices whose names are alike
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", BF16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA GeForce RTX 4090 D", BF16, None),
        ("NVIDIA RTX A1000", BF16, None),
        ("NVIDIA A10G", BF16, None),
        ("Graphics 9000", BF16, None),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, tflops: float | None) -> None:
    assert published_tflops(name, dtype) == tflops


def test_a_gpu_has_its_published_peak_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak = peak_flops(gpu, BF16)
    assert peak is not None
    assert (peak.flops, peak.how) == (989.5e12, "published")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Graphics 9000")
    assert peak_flops(gpu, BF16) is None


def test_tf32_counts_where_it_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert published_tflops("NVIDIA A100-SXM4-80GB", FP32) == 156
        assert published_tflops("Tesla T4", FP32) == 8.1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("known", PUBLISHED_TFLOPS)
def test_no_published_peak_counts_sparsity(known: str) -> None:
    """Types of half the width are at most twice as fast (with structured sparsity it would be four times)."""
    fp32, tf32, half, fp8 = PUBLISHED_TFLOPS[known]
    if tf32 is not None and half is not None:
        assert fp32 <= tf32
        assert half / tf32 == pytest.approx(2, rel=0.03)  # data sheets round
    if half is not None and fp8 is not None:
        assert fp8 / half == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 5, 5), (1, 0, 0), (1, 5, 0)])
def test_a_task_that_sees_one_gpu_takes_it(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert pick_device(local_rank) == torch.device("cuda", index)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"LOCAL_RANK=4, but this process sees 4 GPUs \(0 to 3\)"):
        pick_device(4)
