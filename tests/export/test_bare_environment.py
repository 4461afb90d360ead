# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter in an environment that has what SGLang itself requires, and nothing more."""

from __future__ import annotations

import os
import subprocess
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from engines import Scrape, clean_environment
from packaging.requirements import Requirement
from ports import free_port
from waiting import eventually

import sglang_weight_exporter
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: `Requires-Dist` of SGLang 0.5.9 and 0.5.23, of what this package imports.
BROUGHT_BY_SGLANG = ("msgspec", "nvidia-ml-py", "prometheus-client", "uvicorn")


def closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """These distributions and what they require."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            waiting += [
                required.name
                for required in map(Requirement, found[name].requires or ())
                if required.marker is None or required.marker.evaluate({"extra": ""})
            ]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of such an environment, with this package put there without its own
    requirements."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, symlinks=True)
    (site,) = directory.glob("lib/python3.*/site-packages")
    for each in closure(BROUGHT_BY_SGLANG).values():
        for top in {file.parts[0] for file in each.files or () if file.parts[0] != ".."}:
            source = Path(str(each.locate_file(top)))
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "sglang_weight_exporter").symlink_to(Path(sglang_weight_exporter.__file__).parent)
    return directory / "bin" / "python"


class Served:
    """An exporter process of that interpreter."""

    def __init__(self, python: Path, directory: Path, **variables: str) -> None:
        self.port = free_port()
        self.log = directory / f"exporter-{self.port}.log"
        prefix = "SGLANG_WEIGHT_EXPORTER_"
        own = {"RUNTIME_DIR": str(directory / "run"), "PORT": str(self.port)}
        environment = clean_environment(
            **{prefix + name: value for name, value in own.items()}, **variables
        )
        environment[f"{prefix}ADDRESS"] = "127.0.0.1"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-m", "sglang_weight_exporter", "serve"],
                env=environment,
                cwd="/",
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self, words: str) -> str:
        def line() -> str:
            ended = self.process.poll() is not None
            found = [each for each in self.log.read_text().splitlines() if words in each]
            if ended and not found:
                pytest.fail(f"it ended without {words!r}:\n{self.log.read_text()}")
            return "".join(found[:1])

        return eventually(line, what=f"{words!r} in the log")

    def scrape(self) -> Scrape:
        return Scrape.of(f"http://127.0.0.1:{self.port}/metrics")


@pytest.fixture
def served(bare: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**variables: str) -> Served:
        started.append(Served(bare, tmp_path, **variables))
        return started[-1]

    yield start
    for each in started:
        each.process.terminate()
    for each in started:
        assert each.process.wait(30) == 0, each.log.read_text()


def test_metrics_are_served(served: Callable[..., Served], bare: Path) -> None:
    lacking = ("bcrypt", "yaml", "opentelemetry.sdk", "grpc")
    program = (
        "import importlib.util as u\n"
        "def there(name):\n"
        "    try: return u.find_spec(name) is not None\n"
        "    except ImportError: return False\n"
        f"print([name for name in {lacking} if there(name)])"
    )
    told = subprocess.run([bare, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    exporter = served()
    exporter.said("metrics are at")
    assert exporter.scrape().one("sglang_weight_exporter_ranks") == 0


def test_what_opentelemetry_needs_is_said_and_metrics_are_served(
    served: Callable[..., Served],
) -> None:
    exporter = served(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_METRICS_EXPORTER="otlp"
    )
    line = exporter.said("opentelemetry-sdk")
    assert "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-common" in line
    exporter.said("metrics are at")
    assert exporter.scrape().one("sglang_weight_exporter_spans_waiting") == 0


@pytest.mark.parametrize(
    "text", ["basic_auth_users: {prometheus: x}\n", "http_server_config: {http2: false}\n"]
)
def test_a_web_configuration_names_its_extra(
    text: str, served: Callable[..., Served], tmp_path: Path
) -> None:
    (tmp_path / "web.yml").write_text(text)
    exporter = served(SGLANG_WEIGHT_EXPORTER_WEB_CONFIG_FILE=str(tmp_path / "web.yml"))
    line = exporter.said("cannot be used")
    assert "pip install 'sglang-weight-exporter[web]'" in line
    assert "No metrics are served until that changes" in line


def test_dead_ranks_keep_no_events_for_a_collector_that_cannot_be_reached(
    served: Callable[..., Served], tmp_path: Path
) -> None:
    runtime_dir = RuntimeDir.open(tmp_path / "run", os.environ)
    RankStore(runtime_dir, "0" * 16).close()
    served(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    eventually(lambda: not list(runtime_dir.ranks.iterdir()), what="the end of the dead rank")


#: What an engine process has of this package's, without the rooms that read torch's tensors.
IN_THE_ENGINE = ("hooks.targets", "ledger.ledger", "publisher.publisher", "store.rank")


def test_an_engine_process_imports_msgspec_and_nothing_else(bare: Path) -> None:
    program = (
        "import sys, importlib, msgspec\n"
        "before = set(sys.modules)\n"
        f"for name in {IN_THE_ENGINE}: importlib.import_module('sglang_weight_exporter.' + name)\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}"
        " - set(sys.stdlib_module_names)))"
    )
    told = subprocess.run([bare, "-c", program], capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "['sglang_weight_exporter']", told.stderr
