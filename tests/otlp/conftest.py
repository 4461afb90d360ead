# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A runtime directory with a rank in it, an exporter process, and a collector, for each test."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from collectors import Backend, Rotel
from ranks import ExporterProcess, Rank
from waiting import eventually


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


@pytest.fixture
def rank(runtime_dir: Path) -> Rank:
    return Rank(runtime_dir)


@pytest.fixture
def backend() -> Iterator[Backend]:
    started = Backend().start()
    yield started
    started.stop()


@pytest.fixture
def rotel(backend: Backend) -> Iterator[Rotel]:
    started = Rotel(backend).start()
    yield started
    started.stop()


StartExporter = Callable[..., ExporterProcess]


@pytest.fixture
def start_exporter(runtime_dir: Path) -> Iterator[StartExporter]:
    """Start an exporter process with these variables; ended with the test."""
    started: list[ExporterProcess] = []

    def start(**variables: str) -> ExporterProcess:
        exporter = ExporterProcess(runtime_dir, **variables).start()
        started.append(exporter)
        eventually(exporter.scrape, what="metrics of the exporter process")
        return exporter

    yield start
    for exporter in started:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            exporter.end(signal.SIGKILL)
