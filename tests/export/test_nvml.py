# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A driver that fails, hangs, lies or comes late costs the metrics of GPUs and nothing else; and
each GPU is published by the exporter whose ranks use it."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import Scrape
from serving import Exporter
from waiting import LIMIT, eventually

from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.nvml import GpuMemory, GpuWatch, Nvml
from sglang_weight_exporter.records.engine import Device, Engine, Ranks
from sglang_weight_exporter.records.memory import DeviceMemory
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.store.namespaces import pid_namespace
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: NVML as `nvidia-ml-py` has it, with eight GPUs, which does what a file says at each call. The
#: process of the rank has 3 GiB of each. Names are read by nobody: some are no UTF-8.
PYNVML = """
import os, pathlib, time
MODE = pathlib.Path(os.environ["FAKE_NVML"])
class NVMLError(Exception):
    def __init__(self, value, text): super().__init__(text); self.value = value
NOT_SUPPORTED = NVMLError(3, "Not Supported")
nvmlMemory_v2 = 2
def nvmlInit():
    if MODE.read_text() == "absent": raise NVMLError(9, "Driver Not Loaded")
def nvmlShutdown(): pass
def nvmlDeviceGetCount():
    if MODE.read_text() == "unknown": raise NVMLError(999, "Unknown Error")
    while MODE.read_text() == "hangs": time.sleep(0.05)
    return 8
def nvmlDeviceGetHandleByIndex(index):
    if MODE.read_text() == "odd" and index == 0: raise ValueError("of no kind that is known")
    if MODE.read_text() == "lost" and index == 0: raise NVMLError(15, "GPU is lost")
    return f"GPU-{index}"
def nvmlDeviceGetUUID(gpu): return gpu
def nvmlDeviceGetName(gpu): raise UnicodeDecodeError("utf-8", b"\\xff", 0, 1, "no UTF-8")
def nvmlDeviceGetMemoryInfo(gpu, version=None):
    if MODE.read_text() == "old" and version: raise TypeError("an unexpected keyword argument")
    if MODE.read_text() == "unified": raise NOT_SUPPORTED
    return type("", (), {"total": 80 << 30, "used": 4 << 30, "reserved": 1 << 20})
def nvmlDeviceGetComputeRunningProcesses(gpu):
    if MODE.read_text() == "hidden": raise NVMLError(4, "Insufficient Permissions")
    return [type("", (), {"pid": int(os.environ["RANK"]), "usedGpuMemory": 3 << 30})]
def nvmlDeviceGetMigMode(gpu):
    if gpu != "GPU-0" or MODE.read_text() != "mig": raise NOT_SUPPORTED
    return 1, 1
def nvmlDeviceGetMaxMigDeviceCount(gpu): return 7
def nvmlDeviceGetMigDeviceHandleByIndex(gpu, number):
    if number not in (0, 2): raise NVMLError(6, "Not Found")
    return f"MIG-{number}"
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """What NVML does from now on."""
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml" / "pynvml.py").write_text(textwrap.dedent(PYNVML))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nvml"))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "mode"))
    monkeypatch.setenv("RANK", str(os.getpid()))
    return (tmp_path / "mode").write_text


def a_rank(runtime_dir: RuntimeDir, *uuids: str) -> RankStore:
    """A rank that uses these GPUs, alive in this process; on each torch has 2 GiB of weights."""
    rank = RankStore(runtime_dir, "rank")
    devices = tuple(
        Device(name=f"cuda:{number}", uuid=uuid) for number, uuid in enumerate((*uuids, ""))
    )
    rank.write_snapshot(
        Snapshot(
            rank_id="rank",
            pid=os.getpid(),
            pid_namespace=pid_namespace(),
            started_at=1.0,
            engine=Engine(name="30000", instance="one", model_name="model"),
            ranks=Ranks(tp=0),
            devices=devices,
            memory=tuple(
                DeviceMemory(
                    device=each.name,
                    at=1.0,
                    allocated=2 << 30,
                    reserved=2 << 30,
                    allocated_peak=2 << 30,
                    reserved_peak=2 << 30,
                    parts={"weights": 2 << 30},
                )
                for each in devices
            ),
            roles=(Role(name="target", device="cuda:0"),),
        )
    )
    return rank


@pytest.fixture(autouse=True)
def rank(runtime_dir: RuntimeDir) -> Iterator[RankStore]:
    """Uses the first two of the GPUs, or an instance of the first."""
    rank = a_rank(runtime_dir, "GPU-0", "GPU-1", "MIG-2")
    yield rank
    rank.close()


def scrape(exporter: Exporter) -> Scrape:
    found = Scrape.of(f"http://127.0.0.1:{exporter.port}/metrics")
    assert found.one("sglang_weight_exporter_ranks") == 1  # Served whatever NVML does.
    return found


def gpus(exporter: Exporter, name: str = "sglang_gpu_memory_total_bytes") -> set[str]:
    return {each.labels["gpu_uuid"] for each in scrape(exporter).series(name)}


def errors(exporter: Exporter) -> float:
    return scrape(exporter).one("sglang_weight_exporter_errors_total")


BOTH = {"GPU-0", "GPU-1"}


@pytest.mark.parametrize("mode", ["well", "old"])
def test_gpus_are_there_whatever_the_driver_s_age(
    mode: str, driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver(mode)
    exporter = serve()
    exporter.line("metrics are at")
    assert gpus(exporter) == gpus(exporter, "sglang_gpu_memory_used_max_bytes") == BOTH
    parts = scrape(exporter).sum("sglang_gpu_memory_bytes", gpu_uuid="GPU-0")
    assert parts == 80 << 30
    assert errors(exporter) == 0


@pytest.mark.parametrize(
    ("mode", "said"), [("lost", "NVMLError: GPU is lost"), ("odd", "ValueError: of no kind")]
)
def test_one_that_is_lost_costs_itself_alone_and_is_counted(
    mode: str, said: str, driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver(mode)
    exporter = serve()
    assert said in exporter.line("Reading GPU 0 by NVML failed")
    exporter.line("metrics are at")
    assert gpus(exporter) == {"GPU-1"}
    eventually(lambda: errors(exporter) > 1, what="the error of a later reading")
    driver("well")
    eventually(lambda: gpus(exporter) == BOTH, what="the GPU")
    assert list(exporter.lines.queue) == []  # Each kind of error is logged once.


def test_where_the_memory_is_the_host_s_what_can_be_said_is_said(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    """GB10: NVML knows the GPU and its processes, and not its memory."""
    driver("unified")
    exporter = serve()
    assert "Not Supported" in exporter.line("The memory of GPU-0: the driver does not say it")
    exporter.line("metrics are at")
    found = scrape(exporter)
    of_gpu = {each.name for each in found.samples if each.name.startswith("sglang_gpu_memory")}
    assert of_gpu == {"sglang_gpu_memory_resume_bytes"}  # What ranks say themselves.
    of = {"gpu_uuid": "GPU-0"}
    assert found.one("sglang_rank_memory_process_bytes", **of) == 3 << 30
    assert found.one("sglang_rank_memory_outside_torch_bytes", **of) == 1 << 30
    assert found.one("sglang_rank_memory_bytes", part="weights", **of) == 2 << 30
    assert errors(exporter) == 0


def test_where_processes_are_hidden_the_rest_is_nobody_s(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    driver("hidden")
    exporter = serve()
    assert "Insufficient Permissions" in exporter.line("Processes that have memory of GPU-0")
    exporter.line("metrics are at")
    found = scrape(exporter)
    assert found.one("sglang_gpu_memory_bytes", gpu_uuid="GPU-0", part="weights") == 2 << 30
    assert found.one("sglang_gpu_memory_bytes", gpu_uuid="GPU-0", part="unattributed") == 2 << 30
    assert not found.series("sglang_rank_memory_process_bytes")
    assert errors(exporter) == 0


def test_a_mig_instance_stands_for_itself(
    driver: Callable[[str], object], serve: Callable[..., Exporter]
) -> None:
    """Of a GPU that is cut into instances nobody uses the whole."""
    driver("mig")
    exporter = serve()
    exporter.line("metrics are at")
    found = scrape(exporter).series("sglang_gpu_memory_total_bytes")
    assert {(each.labels["gpu_uuid"], each.labels["gpu"]) for each in found} == {
        ("MIG-2", "0"),
        ("GPU-1", "1"),
    }
    assert errors(exporter) == 0


def test_a_gpu_is_published_by_the_exporter_whose_ranks_use_it(
    rank: RankStore,
    driver: Callable[[str], object],
    serve: Callable[..., Exporter],
    tmp_path: Path,
) -> None:
    """As in two pods that see all GPUs of their host; nobody publishes those without a rank."""
    driver("well")
    other = RuntimeDir.open(tmp_path / "other", {})
    neighbour = a_rank(other, "GPU-5")
    first, second = serve(), serve("--runtime-dir", str(other.path))
    for each in (first, second):
        each.line("metrics are at")
    assert gpus(first) == BOTH
    assert gpus(second) == {"GPU-5"}
    # It goes with the last rank that uses it, as the rank's own series do.
    neighbour.close()
    address = f"http://127.0.0.1:{second.port}/metrics"
    assert not Scrape.of(address).series("sglang_gpu_memory_total_bytes")
    assert gpus(first) == BOTH


@pytest.mark.slow
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


def test_scrapes_do_not_ask_the_driver() -> None:
    """However many there are: a thread asks, and scrapes have what it found last."""
    asked, end = [0], threading.Event()

    class Driver(Nvml):
        def read(self) -> list[GpuMemory]:
            asked[0] += 1
            if asked[0] > 1:
                end.wait()
            return [GpuMemory("GPU-0", 0, total_bytes=80 << 30, used_bytes=4 << 30)]

    watch = GpuWatch(Driver(Guard()), clock=lambda: 0.0)
    watch.start(LIMIT)
    for _ in range(1000):
        (gpu,) = watch.read()
        assert gpu.uuid == "GPU-0"
    assert asked[0] <= 2
    end.set()


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
