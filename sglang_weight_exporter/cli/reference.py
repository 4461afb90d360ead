# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``reference``: what SGLang's own loader makes of a checkpoint, for ``verify --manifest``."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from sglang_weight_exporter.cli.choice import CommandError, exit_status
from sglang_weight_exporter.cli.terminal import print_line
from sglang_weight_exporter.export.references import compare_with_reference, reference_of
from sglang_weight_exporter.settings import PREFIX, Settings
from sglang_weight_exporter.store.runtime_dir import RuntimeDirError
from sglang_weight_exporter.store.tables import Table, TableError, open_tables
from sglang_weight_exporter.verification.checkpoint import CheckpointError
from sglang_weight_exporter.verification.manifest import Manifest, ManifestError, Reference
from sglang_weight_exporter.verification.reference import References

#: What the engine is given besides: weights are all that is wanted of it. A flag that is given
#: again wins.
_SMALL = (
    *("--host", "127.0.0.1", "--max-total-tokens", "512", "--max-running-requests", "1"),
    *("--disable-cuda-graph", "--skip-server-warmup"),
)
_KILL_AFTER = 30.0
_POLL_SECONDS = 0.5
#: Of a setting that was not given.
_SGLANGS_CHOICE = ("auto", "none", "trivial", "{}")
_COMMANDS = ("list", "remove")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Its words are parsed by `run`: most are SGLang's flags, which may be any.
    parser.prefix_chars = "\0"
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    errors = (CheckpointError, ManifestError, RuntimeDirError, TableError)
    return exit_status(partial(_run, arguments.words), *errors)


def _run(words: Sequence[str]) -> int:
    prog = "sglang-weight-exporter reference"
    if words and words[0] in _COMMANDS:
        parser = argparse.ArgumentParser(prog=f"{prog} {words[0]}")
        _add_directory(parser)
        if words[0] == "list":
            return _list(parser.parse_args(words[1:]))
        parser.add_argument("name", nargs="+", help="as `reference list` has it; the beginning")
        return _remove(parser.parse_args(words[1:]))
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --model-path DIR [--] [SGLang's flags]\n       {prog} list\n"
        f"       {prog} remove NAME...",
        description="Start this Python's SGLang as its flags say, take the fingerprints of what "
        "its loader left on each rank of this host, keep them as references, and end it. `verify "
        "--manifest DIRECTORY` compares with them. Exit status: 0, 1 where a reference is there "
        "already and holds something else, 2 when it failed.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", "--model", required=True, help="as SGLang takes it")
    _add_directory(parser)
    parser.add_argument(
        "--hash",
        action="store_true",
        help="tell checkpoints apart by all their bytes, and not by headers and sizes alone",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="what SGLang prints (default: standard error)"
    )
    arguments, flags = parser.parse_known_args([word for word in words if word != "--"])
    return _make(arguments, ["--model-path", arguments.model_path, *flags])


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--reference-dir",
        type=Path,
        metavar="DIRECTORY",
        help=f"of references ({PREFIX}REFERENCE_DIR)",
    )


def _references(arguments: argparse.Namespace) -> References:
    settings, _ = Settings.from_environ(os.environ)
    directory = arguments.reference_dir or settings.reference_dir
    if directory is None:
        raise CommandError(
            f"Name a directory of references with --reference-dir or {PREFIX}REFERENCE_DIR."
        )
    return References(Path(directory).absolute())


# Making.


def _make(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    references = _references(arguments)
    status = 0
    with tempfile.TemporaryDirectory(prefix="reference-") as directory:
        runtime_dir = Path(directory) / "run"
        with _engine(flags, runtime_dir, arguments.log):
            tables = [reader.read(timeout=60.0) for reader in open_tables(runtime_dir)]
            if not tables:
                raise CommandError(
                    "SGLang started, and no rank of it was seen: is this package installed beside "
                    f"{sys.executable}'s SGLang, and does SGLANG_PLUGINS let it load?"
                )
            for table in tables:
                reference = reference_of(table, os.environ, all_bytes=arguments.hash)
                status = max(status, _keep(references, table, reference))
    return status


def _keep(references: References, table: Table, manifest: Manifest) -> int:
    assert manifest.reference is not None  # `reference_of` gives it one.
    key = manifest.reference.key
    name = f"{key.digest}  {table.role.name}  {table.ranks}"
    if references.leave(manifest):
        print_line(f"{name}  {len(manifest.tensors):,} tensors")
        return 0
    there = references.find(key)
    differing = () if there is None else compare_with_reference(table, there, os.environ).differing
    if not differing:
        print_line(f"{name}  is there already and holds the same")
        return 0
    print_line(f"{name}  is there already, and {len(differing):,} tensors are others now:")
    for each in differing[:20]:
        print_line(f"  different  {each}")
    print("`reference remove` takes the old one away.")
    return 1


@contextlib.contextmanager
def _engine(flags: Sequence[str], runtime_dir: Path, log: Path | None) -> Iterator[None]:
    """SGLang with its weights loaded, and ended when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    given = [word.partition("=")[0] for word in flags]
    if "--port" in given:
        raise CommandError("The engine of a reference has a port of its own: leave --port out.")
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PREFIX) and not name.startswith("OTEL_")
    }
    variables |= {
        f"{PREFIX}RUNTIME_DIR": str(runtime_dir),
        f"{PREFIX}FINGERPRINT": "on",
        f"{PREFIX}SERVE": "off",
    }
    command = [sys.executable, "-m", "sglang.launch_server", *_SMALL, "--port", str(port), *flags]
    with contextlib.ExitStack() as closing:
        output = closing.enter_context(log.open("wb")) if log else sys.stderr
        process = subprocess.Popen(
            command, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while not _answers(port):
                if process.poll() is not None:
                    raise CommandError(
                        f"SGLang ended with status {process.returncode} before its weights were "
                        f"loaded; what it printed says why: {' '.join(command)}"
                    )
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            _end(process)


def _answers(port: int) -> bool:
    """Whether it serves HTTP, which it does once every rank has loaded its weights."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """SGLang's main process ends its ranks; what is left of its session is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_AFTER)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Looking at them.


def _list(arguments: argparse.Namespace) -> int:
    references = _references(arguments)
    status = 0
    for path, reference in references.all():
        if isinstance(reference, Reference):
            print_line(_line(reference))
        else:
            status = 1
            print_line(f"{path.stem}  ! {reference}")
    return status


def _line(reference: Reference) -> str:
    key = reference.key
    made_at = datetime.fromtimestamp(reference.made_at, tz=timezone.utc)
    place = f"tp {key.tp_rank} of {key.tp_size or '?'} pp {key.pp_rank} of {key.pp_size or '?'}"
    given = {name: value for name, value in key.settings.items() if value not in _SGLANGS_CHOICE}
    how = " ".join(f"{name}={value}" for name, value in sorted(given.items()))
    return (
        f"{key.digest}  {made_at.isoformat(timespec='seconds')}  {reference.host}  "
        f"{reference.model_path}  {key.role}  {place}  SGLang {key.release}  {key.device}"
        + (f"  {key.quantization}" if key.quantization else "")
        + (f"  {how}" if how else "")
    )


def _remove(arguments: argparse.Namespace) -> int:
    references = _references(arguments)
    there = [path for path, _ in references.all()]
    for name in arguments.name:
        chosen = [path for path in there if path.stem.startswith(name)]
        if len(chosen) != 1 or not name:
            raise CommandError(
                f"{name!r} is the beginning of {len(chosen)} references of {references.directory}, "
                "and has to be of one. `reference list` lists them."
            )
        chosen[0].unlink()
        print_line(f"removed  {chosen[0].stem}")
    return 0
