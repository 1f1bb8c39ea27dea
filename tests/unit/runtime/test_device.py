"""Measured peaks are cached; published ones are found by the device's name."""

import json
from pathlib import Path

import pytest
import torch

from megatrain.runtime import device as device_module
from megatrain.runtime.device import choose_precision, peak_flops

CPU = torch.device("cpu")


def test_a_cpu_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path))
    first = peak_flops(CPU, torch.float32)
    assert first is not None
    assert first.how == "measured"
    assert 1e8 < first.flops < 1e14
    monkeypatch.setattr(device_module, "_time_gemm", lambda dtype: pytest.fail("measured again"))
    assert peak_flops(CPU, torch.float32) == first
    assert len(json.loads((tmp_path / "gemm_peaks.json").read_text())) == 1


def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRAIN_CACHE", str(tmp_path))
    (tmp_path / "gemm_peaks.json").write_text('{"half')
    assert peak_flops(CPU, torch.float32) is not None


@pytest.mark.parametrize(("bf16", "expected"), [(2.0, "bf16"), (1.1, "fp32"), (0.1, "fp32")])
def test_bf16_is_taken_where_it_is_clearly_faster(
    bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {torch.bfloat16: bf16, torch.float32: 1.0}
    monkeypatch.setattr(device_module, "_measured", speed.__getitem__)
    assert choose_precision(CPU) == expected


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_published_peaks(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16)
    assert peak is not None
    assert (peak.flops, peak.how) == (tflops * 1e12, "published")


def test_an_unknown_gpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Graphics 9000")
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) is None
