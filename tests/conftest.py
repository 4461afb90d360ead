# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Which tests run, in which order, and the engines that they share.

`pytest tests` runs what `make test` does, `pytest --release=rules tests` a part of
`make test-release`. A test is in a part by its marker, `@pytest.mark.release("rules")`, or one of
its parameters is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from engine_pool import KINDS, NEWEST, OLDEST, SCRIPT, EnginePool, installation_of, order
from engines import Engine, Installation

POOL = pytest.StashKey[EnginePool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--release",
        metavar="PART",
        help="run this part of `make test-release`, and nothing that is in none",
    )


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "ends_engine: leaves its engine broken or stopped, so it runs after all others",
        "release(part): in this part of `make test-release`, and not in `make test`",
        "slow: takes or waits for seconds, so `make check` leaves it to `make test`",
        "sglang: starts SGLang; set for every test that asks for an engine or an installation",
    ):
        config.addinivalue_line("markers", line)
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


def kinds_of(item: pytest.Item) -> tuple[str, ...]:
    """Kinds of engines that a test needs; `SCRIPT` where it starts SGLang by itself."""
    asked = fixtures_of(item)
    return tuple(name for name in KINDS if name in asked) or (SCRIPT,) * bool(
        asked & {"newest", "oldest"}
    )


def part_of(item: pytest.Item) -> str | None:
    """The part of `make test-release` that a test is in."""
    marker = item.get_closest_marker("release")
    return marker.args[0] if marker else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--release")
    left_out = [item for item in items if part_of(item) != wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if part_of(item) == wanted]
    for item in items:
        if kinds_of(item):
            item.add_marker("sglang")
    items.sort(
        key=lambda item: order(kinds_of(item), ends=bool(item.get_closest_marker("ends_engine")))
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[POOL] = pool = EnginePool()
    pool.plan = {item.nodeid: kinds_of(item) for item in session.items}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    ends = item.get_closest_marker("ends_engine") is not None
    item.config.stash[POOL].before(item.nodeid, ends=ends)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        item.config.stash[POOL].after(item.nodeid)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """What an engine said last, where its end may be why tests failed."""
    if exitstatus == pytest.ExitCode.TESTS_FAILED and POOL in config.stash:
        for name, status, log in config.stash[POOL].ended:
            terminalreporter.section(f"The engine of `{name}` has ended with {status}")
            terminalreporter.write_line(log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if POOL in session.config.stash:
        session.config.stash[POOL].end_all()


@pytest.fixture(scope="session")
def engine_pool(pytestconfig: pytest.Config) -> EnginePool:
    """All engines of this session."""
    return pytestconfig.stash[POOL]


@pytest.fixture(scope="session")
def checkpoints(engine_pool: EnginePool) -> tuple[Path, Path]:
    """Two checkpoints of one shape: the one that every engine loads, and another."""
    return engine_pool.checkpoints()


@pytest.fixture(scope="session")
def newest() -> Installation:
    """An environment with SGLang 0.5.23 and this package."""
    return installation_of(NEWEST)


@pytest.fixture(scope="session")
def oldest() -> Installation:
    """An environment with SGLang 0.5.9 and this package."""
    return installation_of(OLDEST)


def of_kind(name: str) -> Any:
    """The engine of a kind, which tests share."""

    @pytest.fixture(scope="session", name=name)
    def ready(engine_pool: EnginePool) -> Engine:
        return engine_pool.ready(name)

    return ready


#: SGLang 0.5.23 with two tensor-parallel ranks; updates wait for readers, files follow them.
tensor_parallel_engine = of_kind("tensor_parallel_engine")
#: SGLang 0.5.23 with a draft model, which makes no token.
speculative = of_kind("speculative")
#: SGLang 0.5.23 with two data-parallel ranks and its own tracing on; nobody exports.
traced_engine = of_kind("traced_engine")
#: An encoder server of SGLang 0.5.23, which has no model runner; two data-parallel ranks.
encoder = of_kind("encoder")
#: SGLang 0.5.23 with its own metrics on and this package switched off; one rank.
disabled_engine = of_kind("disabled_engine")
#: SGLang 0.5.23 with two data-parallel ranks and its own metrics on; with fingerprints.
engine = of_kind("engine")
#: SGLang 0.5.9, which has no plugins and updates weights in ModelRunner; one rank.
old_engine = of_kind("old_engine")
