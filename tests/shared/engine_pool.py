# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds of SGLang engines that tests share, and the pool that starts and ends them.

An engine needs a minute or two of processor time before it answers, and two gigabytes. So each
kind is started once: tests are sorted by the kind that they need. While the tests of one kind run,
the next kind starts; when the last test of a kind is through, it ends. Two are alive at most.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import draft_plugin
import pytest
import tiny_model
from engines import Engine, Installation, kill, sglang_version

NEWEST, OLDEST = "0.5.23", "0.5.9"

#: How many engines live at once.
AT_MOST = 2

#: Stands for what a test starts by itself with SGLang in it, and counts as an engine.
SCRIPT = "script"

FINGERPRINT = ("SGLANG_WEIGHT_EXPORTER_FINGERPRINT", "on")
#: Of one rank's readers: update, and a directory that follows the engine.
FOR_READERS = (
    ("SGLANG_WEIGHT_EXPORTER_METADATA_DIR", "{directory}/weights_metadata"),
    ("SGLANG_WEIGHT_EXPORTER_READER_WAIT_SECONDS", "300"),
)


@dataclass(frozen=True)
class EngineKind:
    """How the engine behind a fixture is started. `{checkpoints}` is where they are."""

    version: str
    flags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    checkpoint: str = "a"


#: By the name of their fixture, in the order in which they are started. One that a test needs
#: beside another stands directly before it.
KINDS = {
    # Over gloo. torch for CUDA brings an NCCL, which wants a GPU.
    "tensor_parallel_engine": EngineKind(
        NEWEST,
        ("--tp-size", "2", "--disable-custom-all-reduce"),
        (
            ("SGLANG_NCCL_SO_PATH", "none"),
            ("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "0"),
            ("GLOO_SOCKET_IFNAME", "lo"),
            ("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),
            FINGERPRINT,
            ("SGLANG_WEIGHT_EXPORTER_MANIFEST_DIR", "{directory}/sent"),
            *FOR_READERS,
        ),
    ),
    # Makes no token: SGLang's wheel lacks for the CPU what speculation needs.
    "speculative": EngineKind(
        NEWEST,
        (
            *("--speculative-algorithm", "STANDALONE"),
            *("--speculative-draft-model-path", "{checkpoints}/draft"),
            *("--speculative-num-steps", "1", "--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", "2"),
            *("--speculative-draft-attention-backend", "triton", "--skip-server-warmup"),
        ),
        (
            ("PYTHONPATH", "{checkpoints}/plugin"),
            ("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0"),
            FINGERPRINT,
        ),
    ),
    # Its own tracing is on, and nobody exports what the package writes.
    "traced_engine": EngineKind(
        NEWEST,
        ("--dp-size", "2", "--enable-trace", "--otlp-traces-endpoint", "127.0.0.1:{otlp_port}"),
        (("SGLANG_WEIGHT_EXPORTER_SERVE", "off"),),
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
        checkpoint="vision",
    ),
    "disabled_engine": EngineKind(
        NEWEST, ("--enable-metrics",), (("SGLANG_WEIGHT_EXPORTER_DISABLED", "1"),)
    ),
    "engine": EngineKind(NEWEST, ("--dp-size", "2", "--enable-metrics"), (FINGERPRINT,)),
    "old_engine": EngineKind(OLDEST, variables=(FINGERPRINT, *FOR_READERS)),
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
        f"needs SGLang {version}: `make test` installs the newest one, `make test-release` the"
        " oldest; or name an environment that has it and this package in SGLANG_ENVIRONMENTS"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


class EnginePool:
    """The engines of one test session, by kind."""

    def __init__(self) -> None:
        #: The kinds that each test needs which is still to run, in their order.
        self.plan: dict[str, tuple[str, ...]] = {}
        #: Kind, exit status and end of the log of each that did not live until it was ended.
        self.ended: list[tuple[str, int, str]] = []
        self._engines: dict[str, Engine] = {}
        self._over: set[str] = set()
        self._directory: Path | None = None

    def checkpoints(self) -> tuple[Path, Path]:
        """Two checkpoints of one shape: the one that every engine loads, and another."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="checkpoints-"))
            for seed, name in enumerate("ab"):
                tiny_model.write(self._directory / name, seed)
            tiny_model.write(self._directory / "draft", seed=2, layers=1)
            tiny_model.write_vision(self._directory / "vision")
            draft_plugin.write(self._directory / "plugin")
        return self._directory / "a", self._directory / "b"

    def before(self, test: str, *, ends: bool) -> None:
        """Start what a test needs, and the kind that is needed next. `ends`: it knows that its
        engine may have ended."""
        if not self.plan[test]:
            return
        wanted = dict.fromkeys(kind for kinds in self.plan.values() for kind in kinds)
        for name in [name for name in list(wanted)[:AT_MOST] if name != SCRIPT]:
            # What is missing is said by the tests that need it.
            with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
                self._start(name)
        for engine in self._engines.values():
            engine.let_others_go_first()
        for name in self._engines.keys() & set(self.plan[test]):
            if not ends:
                self._revive(name)

    def after(self, test: str) -> None:
        """End what no further test needs."""
        del self.plan[test]
        needed = {kind for kinds in self.plan.values() for kind in kinds}
        for name in self._engines.keys() - self._over - needed:
            self.end(name)

    def ready(self, name: str) -> Engine:
        """The engine of that kind, once it answers."""
        return self._start(name).wait_until_ready()

    def end(self, name: str) -> None:
        """End one engine for good and free its memory."""
        self._over.add(name)
        engine = self._engines[name]
        if (status := engine.main.poll()) is not None:
            self.ended.append((name, status, engine.log()[-3000:]))
        engine.stop()

    def end_all(self) -> None:
        """End every engine."""
        for name in self._engines.keys() - self._over:
            self.end(name)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _revive(self, name: str) -> None:
        """Start an engine again that has ended, so that its end fails one test and not all."""
        engine = self._engines[name]
        if (status := engine.main.poll()) is not None:
            self.ended.append((name, status, engine.log()[-3000:]))
            kill(engine.processes())
            engine.start()
            engine.wait_until_ready()

    def _start(self, name: str) -> Engine:
        """Start the engine unless it was started; does not wait."""
        if name not in self._engines:
            kind = KINDS[name]
            directory = self.checkpoints()[0].parent
            place = "{checkpoints}", str(directory)
            engine = Engine(
                installation_of(kind.version),
                directory / kind.checkpoint,
                flags=[flag.replace(*place) for flag in kind.flags],
                variables={key: value.replace(*place) for key, value in kind.variables},
            )
            engine.start()
            self._engines[name] = engine
        return self._engines[name]


def order(kinds: Sequence[str], *, ends: bool) -> tuple[int, int, bool]:
    """Where a test that needs these kinds stands: by its first kind, last what needs two, and at
    the very end of a kind what leaves it broken."""
    names = [SCRIPT, *KINDS]
    if not kinds:
        return -1, 0, False
    return min(map(names.index, kinds)), len(kinds), ends
