# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A driver that fails, hangs, lies or comes late costs the metrics of GPUs and nothing else."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import Scrape
from serving import Exporter
from waiting import eventually

#: NVML as `nvidia-ml-py` has it, which does what a file says at each call.
PYNVML = """
import os, pathlib, time
MODE = pathlib.Path(os.environ["FAKE_NVML"])
class NVMLError(Exception): pass
nvmlMemory_v2 = 2
def nvmlInit():
    if MODE.read_text() == "absent": raise NVMLError("Driver Not Loaded")
def nvmlShutdown(): pass
def nvmlDeviceGetCount():
    if MODE.read_text() == "unknown": raise NVMLError("Unknown Error")
    while MODE.read_text() == "hangs": time.sleep(0.05)
    return 2
def nvmlDeviceGetHandleByIndex(index):
    if MODE.read_text() == "lost" and index == 0: raise ValueError("of no kind that is known")
    return index
def nvmlDeviceGetPciInfo(gpu): return type("", (), {"busId": b"00000000:01:00.0"})
def nvmlDeviceGetUUID(gpu): return f"GPU-{gpu}"
def nvmlDeviceGetName(gpu):
    if MODE.read_text() == "raises": raise UnicodeDecodeError("utf-8", b"\\xff", 0, 1, "no UTF-8")
    return b"NVIDIA \\xff" if MODE.read_text() == "name" else "NVIDIA H100"
def nvmlDeviceGetMemoryInfo(gpu, version=None):
    if MODE.read_text() == "old" and version: raise TypeError("an unexpected keyword argument")
    return type("", (), {"total": 80 << 30, "used": 1 << 30, "reserved": 1 << 20})
def nvmlDeviceGetComputeRunningProcesses(gpu): return []
def nvmlDeviceGetMigMode(gpu): raise NVMLError("Not Supported")
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """What NVML does from now on."""
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml" / "pynvml.py").write_text(textwrap.dedent(PYNVML))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nvml"))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "mode"))
    return (tmp_path / "mode").write_text


def gpus(exporter: Exporter) -> set[str]:
    scrape = Scrape.of(f"http://127.0.0.1:{exporter.port}/metrics")
    assert scrape.one("sglang_weight_exporter_ranks") == 0  # The rest is served whatever NVML does.
    return {each.labels["gpu_uuid"] for each in scrape.series("sglang_gpu_memory_total_bytes")}


BOTH = {"GPU-0", "GPU-1"}


@pytest.mark.parametrize("mode", ["well", "name", "raises", "old"])
def test_gpus_are_there_whatever_their_names_and_the_driver_s_age(
    mode: str, driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver(mode)
    exporter = serve()
    exporter.line("metrics are at")
    assert gpus(exporter) == BOTH


def test_one_that_is_lost_costs_itself_alone(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver("lost")
    exporter = serve()
    exporter.line("metrics are at")
    assert gpus(exporter) == {"GPU-1"}


@pytest.mark.parametrize("mode", ["unknown", "hangs"])
def test_a_failure_is_said_once_and_so_is_the_return(
    mode: str, driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver("well")
    exporter = serve()
    exporter.line("metrics are at")
    assert gpus(exporter) == BOTH
    driver(mode)
    line = exporter.line("no metrics of GPUs")
    assert {"unknown": "Unknown Error", "hangs": "has not answered"}[mode] in line
    for _ in range(3):
        assert gpus(exporter) == set()
        assert exporter.request("/healthz")[0] == 200
    driver("well")
    exporter.line("NVML answers again")
    eventually(lambda: gpus(exporter) == BOTH, what="the GPUs")
    assert list(exporter.lines.queue) == []


def test_a_driver_that_comes_later_is_found(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver("absent")
    exporter = serve()
    assert "Driver Not Loaded" in exporter.line("no metrics of GPUs")
    exporter.line("metrics are at")
    driver("well")
    exporter.line("NVML answers again")
    eventually(lambda: gpus(exporter) == BOTH, what="the GPUs")


def test_a_call_that_never_ends_does_not_keep_the_process(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver("hangs")
    exporter = serve()
    exporter.line("metrics are at")
    assert gpus(exporter) == set()
    exporter.process.send_signal(signal.SIGTERM)
    assert exporter.process.wait(30) == 0
