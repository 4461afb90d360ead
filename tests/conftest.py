# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real SGLang engines as fixtures, each started once, early, and in the background.

An engine needs a minute or two before it answers, so those that the collected tests ask for are
started when collection ends, the tests that need none run first, and the fixtures wait.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_model
from engines import Engine, Installation, sglang_version

NEWEST, OLDEST = "0.5.23", "0.5.9"


@dataclass(frozen=True)
class EngineKind:
    """How the engine behind a fixture is started."""

    version: str
    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    #: Loads a vision tower alone.
    vision: bool = False


KINDS = {
    "engine": EngineKind(
        NEWEST,
        ("--dp-size", "2", "--enable-metrics"),
        (("SGLANG_WEIGHT_EXPORTER_FINGERPRINT", "on"),),
    ),
    "old_engine": EngineKind(
        OLDEST,
        variables=(
            ("SGLANG_WEIGHT_EXPORTER_METADATA_DIR", "{directory}/weights_metadata"),
            ("SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS", "5"),
        ),
    ),
    "disabled_engine": EngineKind(
        NEWEST, ("--enable-metrics",), (("SGLANG_WEIGHT_EXPORTER_DISABLED", "1"),)
    ),
    "encoder": EngineKind(
        NEWEST,
        ("--encoder-only", "--dp-size", "2"),
        (
            # With it on, SGLang asks for operators that only its own build for CPUs has.
            ("SGLANG_USE_CPU_ENGINE", "0"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:{otlp_port}"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_SERVICE_NAME", "encoders"),
        ),
        vision=True,
    ),
}


def installation_of(version: str) -> Installation:
    """SGLang of that version among `SGLANG_ENVIRONMENTS` (a path list) or beside this Python.

    Without one the test is skipped; in CI, which can install it, it fails.
    """
    prefixes = os.environ.get("SGLANG_ENVIRONMENTS", sys.prefix).split(os.pathsep)
    for prefix in map(Path, prefixes):
        python = prefix / "bin" / "python"
        if sglang_version(python) == version:
            return Installation(python)
    message = (
        f"needs SGLang {version}: `make test` installs it, or name an environment that has it"
        " and this package in SGLANG_ENVIRONMENTS"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class Engines:
    """The engines of one test session, by fixture name."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._directory: Path | None = None

    def checkpoints(self) -> tuple[Path, Path]:
        """Two checkpoints of one shape: the one that every engine loads, and another."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="checkpoints-"))
            for seed, name in enumerate("ab"):
                tiny_model.write(self._directory / name, seed)
            tiny_model.write_vision(self._directory / "vision")
        return self._directory / "a", self._directory / "b"

    def start(self, name: str) -> Engine:
        """Start the engine unless it was started; does not wait."""
        if name not in self._engines:
            kind = KINDS[name]
            first, _ = self.checkpoints()
            engine = Engine(
                installation_of(kind.version),
                first.with_name("vision") if kind.vision else first,
                flags=kind.flags,
                variables=dict(kind.variables),
            )
            self._engines[name] = engine
            engine.start()
        return self._engines[name]

    def let_others_go_first(self) -> None:
        """Have engines that only wait take the processor from nobody."""
        for engine in self._engines.values():
            engine.let_others_go_first()

    def stop(self, name: str) -> None:
        """End one engine for good and free its memory."""
        if name in self._engines:
            self._engines[name].stop()

    def ended(self) -> Iterator[tuple[str, int, str]]:
        """Name, exit status and end of the log of each that ended and was not stopped."""
        for name, engine in self._engines.items():
            status = engine.main.poll()
            if status is not None and (log := engine.log()):
                yield name, status, log[-3000:]

    def stop_all(self) -> None:
        """End every engine."""
        for name in self._engines:
            self.stop(name)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


ENGINES = pytest.StashKey[Engines]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "ends_engine: leaves its engine broken or stopped, so it runs after all others"
    )
    with contextlib.suppress(ImportError):  # Not on the machines with GPUs.
        from hypothesis import HealthCheck, settings

        # How long an example takes tells of a busy machine only; in CI it is Hypothesis's default.
        slow = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
        settings.register_profile("untimed", **slow)
        settings.load_profile("untimed")


def fixtures_of(item: pytest.Item) -> set[str]:
    """Fixtures of a test, also those that it names in its parameters."""
    names = set(getattr(item, "fixturenames", ()))
    if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        names |= {value for value in item.callspec.params.values() if isinstance(value, str)}
    return names


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def when(item: pytest.Item) -> int:
        if item.get_closest_marker("ends_engine"):
            return 2
        return int(bool(fixtures_of(item) & KINDS.keys()))

    items.sort(key=when)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    asked = {name for item in session.items for name in fixtures_of(item)}
    session.config.stash[ENGINES] = engines = Engines()
    for name in KINDS:
        if name in asked:
            # What is missing is said by the tests that need it.
            with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
                engines.start(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    engines = item.config.stash.get(ENGINES, None)
    if engines is not None:
        engines.let_others_go_first()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """What an engine said last, where its end may be why tests failed."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED and ENGINES in config.stash:
        for name, status, log in config.stash[ENGINES].ended():
            terminalreporter.section(f"The engine of `{name}` has ended with {status}")
            terminalreporter.write_line(log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if ENGINES in config.stash:
        config.stash[ENGINES].stop_all()


@pytest.fixture(scope="session")
def engines(pytestconfig: pytest.Config) -> Engines:
    """All engines of this session."""
    return pytestconfig.stash[ENGINES]


@pytest.fixture(scope="session")
def checkpoints(engines: Engines) -> tuple[Path, Path]:
    """Two checkpoints of one shape: the one that every engine loads, and another."""
    return engines.checkpoints()


@pytest.fixture(scope="session")
def newest() -> Installation:
    """An environment with SGLang 0.5.23 and this package."""
    return installation_of(NEWEST)


@pytest.fixture(scope="session")
def oldest() -> Installation:
    """An environment with SGLang 0.5.9 and this package."""
    return installation_of(OLDEST)


@pytest.fixture(scope="session")
def engine(engines: Engines) -> Engine:
    """SGLang 0.5.23 with two data-parallel ranks and its own metrics on."""
    return engines.start("engine").wait_until_ready()


@pytest.fixture(scope="session")
def old_engine(engines: Engines) -> Engine:
    """SGLang 0.5.9, which has no plugins and updates weights in ModelRunner; one rank."""
    return engines.start("old_engine").wait_until_ready()


@pytest.fixture(scope="module")
def encoder(engines: Engines) -> Iterator[Engine]:
    """An encoder server of SGLang 0.5.23, which has no model runner; two data-parallel ranks."""
    yield engines.start("encoder").wait_until_ready()
    engines.stop("encoder")


@pytest.fixture(scope="module")
def disabled_engine(engines: Engines) -> Iterator[Engine]:
    """SGLang 0.5.23 with its own metrics on and this package switched off; one rank."""
    yield engines.start("disabled_engine").wait_until_ready()
    engines.stop("disabled_engine")
