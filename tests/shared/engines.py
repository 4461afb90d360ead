# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Start, watch and end real SGLang engines, and read the exporter's endpoint.

Engines run on the CPU, or on the GPU with `gpu=True`. The tests and the demo use the same code.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ports import free_port
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from waiting import LIMIT, eventually, forget, watch

PREFIX = "SGLANG_WEIGHT_EXPORTER_"
KERNELS = "sgl_kernel/**/common_ops*.so"


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until the kernel has ended every thread and so let go of every lock.

    A killed process may stay as a zombie while its parent does not look.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()

    def ended(process: psutil.Process) -> bool:
        try:
            threads = os.listdir(f"/proc/{process.pid}/task")  # noqa: PTH208
            return threads == [str(process.pid)] and process.status() == psutil.STATUS_ZOMBIE
        except (OSError, psutil.NoSuchProcess):
            return True

    eventually(lambda: all(ended(process) for process in processes), what="killed")


def http_get(
    url: str, *, headers: Mapping[str, str] | None = None, timeout: float = LIMIT
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower-case names) and body of a GET; a status of 400 up does not raise."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        answer = error.code, error.headers, error.read()
    status, fields, body = answer
    return status, {name.lower(): value for name, value in fields.items()}, body


class Scrape:
    """One answer of a metrics endpoint in the Prometheus text format."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    @classmethod
    def of(cls, url: str, timeout: float = LIMIT) -> Scrape:
        """Read `url`; AssertionError unless it answers 200."""
        status, _, body = http_get(url, timeout=timeout)
        assert status == 200, f"{url} answered {status}: {body[:500]!r}"
        return cls(body.decode())

    def names(self) -> set[str]:
        """Names of the samples."""
        return {sample.name for sample in self.samples}

    def series(self, name: str, **labels: str) -> list[Sample]:
        """Samples of that name whose labels contain `labels`."""
        return [
            sample
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def sum(self, name: str, **labels: str) -> float:
        """Sum over the matching series, of which there must be one at least."""
        found = self.series(name, **labels)
        assert found, f"no series {name}{labels} in:\n{self.text}"
        return float(sum(sample.value for sample in found))

    def one(self, name: str, **labels: str) -> float:
        """Value of the only matching series."""
        found = self.series(name, **labels)
        assert len(found) == 1, f"{len(found)} series {name}{labels} in:\n{self.text}"
        return float(found[0].value)


@functools.cache
def cuda_driver_stub(python: Path) -> Path:
    """A directory with an empty `libcuda.so.1` that SGLang's kernel library links against.

    SGLang imports its CUDA kernels on a CPU too, and they need the library that only a driver
    installs. The functions they name are defined here and return CUDA_ERROR_NO_DEVICE; on the CPU
    none is called.
    """
    site_packages = python.parent.parent.glob("lib/python3.*/site-packages")
    libraries = [str(path) for site in site_packages for path in site.glob(KERNELS)]
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], check=True, capture_output=True, text=True
    ).stdout
    names = {word.split("@")[0] for word in symbols.split() if word.startswith("cu")}
    functions = sorted(name for name in names if name[2:3].isupper())
    directory = Path(tempfile.mkdtemp(prefix="cuda-stub-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    source = "\n".join(f"int {name}(void) {{ return 100; }}" for name in functions)
    (directory / "cuda.c").write_text(source)
    compile_library = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    library = str(directory / "libcuda.so.1")
    subprocess.run([*compile_library, "-o", library, str(directory / "cuda.c")], check=True)
    return directory


def sglang_version(python: Path) -> str | None:
    """The SGLang release in the environment of an interpreter, None without one."""
    for found in python.parent.parent.glob("lib/python3.*/site-packages/sglang-*.dist-info"):
        return found.name.removeprefix("sglang-").removesuffix(".dist-info")
    return None


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would steer SGLang, OpenTelemetry or the exporter,
    which serves all of its metrics.

    Python may write bytecode: an engine imports SGLang in four processes and starts twice as fast
    with it.
    """
    dropped = ("SGLANG_", "OTEL_", "PROMETHEUS_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    full = {PREFIX + "METRICS": "full"}
    return {**kept, "HF_HUB_OFFLINE": "1", **full, **variables}


@dataclass(frozen=True)
class Installation:
    """An interpreter beside which SGLang and this package are installed."""

    python: Path
    gpu: bool = False
    graphs: bool = False

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment in which SGLang runs on this machine."""
        if self.gpu:
            return clean_environment(**variables)
        stub = cuda_driver_stub(self.python)
        path = os.environ.get("LD_LIBRARY_PATH")
        return clean_environment(
            LD_LIBRARY_PATH=f"{stub}:{path}" if path else str(stub),
            **{"SGLANG_USE_CPU_ENGINE": "1", **variables},
        )

    def server_flags(self) -> list[str]:
        """Flags that make a tiny model start fast and use little memory."""
        # An idle scheduler keeps a core busy unless it is told to sleep.
        flags = "--context-length 512 --max-total-tokens 4096 --sleep-on-idle"
        if self.gpu:
            # Other backends compile kernels for a minute before the first answer.
            flags += " --mem-fraction-static 0.3"
            flags += " --cuda-graph-max-bs 4" if self.graphs else " --disable-cuda-graph"
            flags += " --attention-backend triton --sampling-backend pytorch"
        else:
            # The fraction counts memory that other processes take meanwhile, so it is generous;
            # --max-total-tokens is what bounds the pool.
            flags += " --mem-fraction-static 0.8 --device cpu --disable-overlap-schedule"
        return flags.split()


class Engine:
    """A real `sglang.launch_server` and the exporter process that its first rank starts.

    The runtime directory, the ports and the log are the engine's own. `start` returns
    at once; `wait_until_ready` waits for /health.
    """

    def __init__(
        self,
        installation: Installation,
        model: Path,
        *,
        flags: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        port: int | None = None,
        exporter_port: int | None = None,
        address: str = "127.0.0.1",
        within: Sequence[str] = (),
    ) -> None:
        """`within`: a command that ends by executing the command that is given to it."""
        self.installation = installation
        self.model = model
        self.flags = list(flags)
        self.directory = Path(tempfile.mkdtemp(prefix="engine-"))
        self.runtime_dir = self.directory / "runtime"
        self.log_file = self.directory / "engine.log"
        self.port = port or free_port(engine=True)
        self.exporter_port = exporter_port or free_port()
        self.address = address
        self.within = list(within)
        self.url = f"http://{address}:{self.port}"
        self.exporter_url = f"http://{address}:{self.exporter_port}"
        self.variables = {
            PREFIX + "RUNTIME_DIR": str(self.runtime_dir),
            PREFIX + "PORT": str(self.exporter_port),
            PREFIX + "ADDRESS": address,
            **(variables or {}),
        }
        #: Where a collector may listen: `{otlp_port}` in a flag or a variable.
        self.otlp_port = free_port()
        for place, meant in (
            ("{directory}", str(self.directory)),
            ("{otlp_port}", str(self.otlp_port)),
        ):
            self.flags = [flag.replace(place, meant) for flag in self.flags]
            self.variables = {
                name: value.replace(place, meant) for name, value in self.variables.items()
            }
        if "--dp-size" in self.flags and not installation.gpu:
            # Two ranks on one NUMA node need their cores named.
            self.variables["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
        self.environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        self._controller_waits = False

    def start(self) -> None:
        """Start the server in a session of its own, out of Ctrl-C's reach; does not wait."""
        self.environment = self.installation.environment(**self.variables)
        command = [*self.within, str(self.installation.python), "-m", "sglang.launch_server"]
        command += ["--model-path", str(self.model), "--host", self.address]
        command += ["--port", str(self.port), *self.installation.server_flags(), *self.flags]
        with watch(self.log_file).open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._process is not None

    @property
    def main(self) -> subprocess.Popen[bytes]:
        """SGLang's main process."""
        assert self._process is not None, "the engine was not started"
        return self._process

    def log(self) -> str:
        """Everything that the engine and the exporter printed so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def ready(self) -> bool:
        """Whether /health answers 200; AssertionError with the log's end if the engine ended."""
        if self.main.poll() is not None:
            raise AssertionError(f"SGLang ended with {self.main.returncode}:\n{self.log()[-6000:]}")
        try:
            return http_get(self.url + "/health")[0] == 200
        except OSError:
            return False

    def wait_until_ready(self, *, peers: Sequence[Engine] = ()) -> Engine:
        """Wait until /health answers 200. AssertionError with the log's end if it does not.

        `peers`: parts of one engine on other hosts. One that has ended says so at once, where this
        one would wait for it."""
        deadline = time.monotonic() + LIMIT
        while False in [engine.ready() for engine in (self, *peers)]:
            if time.monotonic() > deadline:
                raise AssertionError(f"no health in {LIMIT:g} s:\n{self.log()[-6000:]}")
            time.sleep(0.5)
        self.let_others_go_first()
        return self

    def let_others_go_first(self) -> None:
        """Lower the priority of SGLang's data-parallel controller, which polls without a pause from
        its start on; does nothing until there is one."""
        if self._controller_waits or "--dp-size" not in self.flags or not self.started:
            return
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.main.pid).children(recursive=True):
                if "data_parallel_controller" in " ".join(process.cmdline()):
                    process.nice(19)
                    self._controller_waits = True

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """POST a JSON body to SGLang; status and parsed answer, also of an error."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as response:
                status, answer = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        return status, json.loads(answer) if answer else None

    def update_weights_from_disk(self, model: Path) -> tuple[int, Any]:
        """SGLang's own reload endpoint."""
        return self.post("/update_weights_from_disk", {"model_path": str(model)})

    def flush_cache(self) -> tuple[int, str]:
        """SGLang's own flush; refused (400) while requests run."""
        request = urllib.request.Request(self.url + "/flush_cache", data=b"")
        try:
            with urllib.request.urlopen(request, timeout=LIMIT) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def put_requests_away(self) -> None:
        """Have every scheduler go on to its next turn: until then a request that was answered may
        still count as running, and an update that flushes fails, or ends an engine of 0.5.9 with an
        assertion of SGLang's. What is asked of a scheduler is answered in a turn."""
        self.server_info()

    def server_info(self) -> dict[str, Any]:
        """SGLang's own account of its configuration."""
        status, _, body = http_get(self.url + "/server_info", timeout=LIMIT)
        if status == 404:
            status, _, body = http_get(self.url + "/get_server_info", timeout=LIMIT)
        assert status == 200, body
        info: dict[str, Any] = json.loads(body)
        return info

    def scrape(self) -> Scrape:
        """What the exporter serves now."""
        return Scrape.of(self.exporter_url + "/metrics")

    def exporter_cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m sglang_weight_exporter` in the engine's environment."""
        return subprocess.run(
            [str(self.installation.python), "-m", "sglang_weight_exporter", *arguments],
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def processes(self) -> list[psutil.Process]:
        """Every process of this engine, orphans included: by group, or by its settings."""
        found = []
        for process in psutil.process_iter():
            # SGLang retitles its processes over their environment, so neither sign is enough.
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and (
                    (self.started and os.getpgid(process.pid) == self.main.pid)
                    or process.environ().get(PREFIX + "RUNTIME_DIR") == str(self.runtime_dir)
                ):
                    found.append(process)
        return found

    def exporters(self) -> list[psutil.Process]:
        """The exporter processes; one when all is well."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "serve" in command and any("sglang_weight_exporter" in part for part in command):
                    found.append(process)
        return found

    def schedulers(self) -> list[psutil.Process]:
        """SGLang's scheduler processes, in the order of their titles: one a rank."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("sglang::scheduler"):
                    found.append((title, process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def terminate(self, seconds: float = 30.0) -> None:
        """Ask SGLang's main process to end, as a service manager does, and wait for it."""
        if self.main.poll() is None:
            self.main.send_signal(signal.SIGTERM)
            self.main.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.main.wait(seconds)

    def stop(self) -> None:
        """End the engine and everything that it started, and remove its directory."""
        if self.started:
            self.terminate(15)
        kill(self.processes())
        if self.started:
            self.main.wait()
        forget(self.log_file)
        shutil.rmtree(self.directory, ignore_errors=True)
