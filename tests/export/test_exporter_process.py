# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One exporter for all ranks, whoever dies: ranks are processes here, and so is the exporter."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port
from waiting import LIMIT, eventually

from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.store.reader import SnapshotReader, read_endpoint
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

RANK = """
import logging, os, sys
from pathlib import Path
from sglang_weight_exporter.publisher.exporter_process import Supervisor
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
runtime_dir = RuntimeDir.open(Path(sys.argv[1]), {})
rank = RankStore(runtime_dir, sys.argv[2])
Supervisor(runtime_dir, os.environ, come_back=lambda: None).start()
sys.stdin.read()
"""

#: Its version goes up with each line that it is told.
CHANGING_RANK = """
import itertools, os, sys
from pathlib import Path
from sglang_weight_exporter.publisher.publisher import Publisher
from sglang_weight_exporter.records.engine import Engine
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.settings import Settings
publisher = Publisher(
    Settings(runtime_dir=Path(sys.argv[1])), os.environ,
    report=lambda what, error: print(what, error, flush=True),
)
engine = Engine(name="30000", instance=sys.argv[2], model_name=sys.argv[2])
for version, _ in enumerate(itertools.chain([""], sys.stdin)):
    publisher.publish(
        Snapshot(rank_id="", pid=os.getpid(), started_at=1.0, engine=engine,
                 roles=(Role(name="target", device="cpu"),), weight_version=str(version)),
        {},
    )
"""

#: As CPython says it where a container is at its limit of processes.
NO_THREADS = """
import threading
def refuse(*arguments, **more):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
"""

#: As a network file system without a lock server answers.
NO_LOCKS = """
import errno, fcntl, os
def refuse(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = refuse
"""

Rank = subprocess.Popen[str]


@pytest.fixture
def runtime_dir(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir.open(tmp_path / "runtime", {})


@pytest.fixture
def start_rank(runtime_dir: RuntimeDir) -> Iterator[Callable[..., Rank]]:
    port = free_port()
    ranks: list[Rank] = []

    def start(
        name: str, program: str = RANK, *, inside: tuple[str, ...] = (), **variables: str
    ) -> Rank:
        process = subprocess.Popen(
            [*inside, sys.executable, "-c", program, str(runtime_dir.path), name],
            env={
                **os.environ,
                "SGLANG_WEIGHT_EXPORTER_PORT": str(port),
                "SGLANG_WEIGHT_EXPORTER_ADDRESS": "127.0.0.1",
                **variables,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
        return process

    yield start
    for process in ranks:
        process.kill()
        process.communicate()
    endpoint = read_endpoint(runtime_dir)
    if endpoint is not None:
        os.kill(endpoint.pid, signal.SIGKILL)


def serving(runtime_dir: RuntimeDir, *, unlike: int = 0) -> ExporterEndpoint:
    """The exporter that serves now, once it does; a process other than ``unlike``."""
    found: list[ExporterEndpoint] = []

    def look() -> bool:
        endpoint = read_endpoint(runtime_dir)
        if endpoint is None or endpoint.url is None or endpoint.pid == unlike:
            return False
        found.append(endpoint)
        return True

    eventually(look)
    return found[0]


def test_a_killed_exporter_is_replaced_also_by_a_rank_that_did_not_start_it(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    first = start_rank("first")
    original = serving(runtime_dir)
    start_rank("second")
    os.kill(original.pid, signal.SIGKILL)
    replaced = serving(runtime_dir, unlike=original.pid)
    # Its parent may die: an orphan goes on, and after it the other rank takes over.
    first.kill()
    first.wait()
    current = serving(runtime_dir)
    os.kill(current.pid, signal.SIGKILL)
    assert serving(runtime_dir, unlike=current.pid).url == replaced.url


@pytest.mark.slow
def test_exporters_that_are_killed_one_after_another_are_all_replaced(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    ranks = [start_rank(name) for name in ("first", "second", "third")]
    current = serving(runtime_dir)
    url = current.url
    for _ in range(5):
        os.kill(current.pid, signal.SIGKILL)
        current = serving(runtime_dir, unlike=current.pid)
        assert current.url == url
    # The one that started it, one that waits, and the exporter itself, at once.
    for pid in (ranks[0].pid, ranks[1].pid, current.pid):
        os.kill(pid, signal.SIGKILL)
    last = serving(runtime_dir, unlike=current.pid)
    assert last.url == url
    assert ranks[2].poll() is None


@pytest.mark.slow
def test_a_port_that_another_program_took_meanwhile_is_taken_back_when_it_is_free(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    start_rank("only")
    exporter = serving(runtime_dir)
    assert exporter.url is not None
    port = urllib.parse.urlsplit(exporter.url).port
    os.kill(exporter.pid, signal.SIGKILL)
    taken: list[socket.socket] = []

    def take() -> bool:
        with contextlib.suppress(OSError):
            taken.append(socket.create_server(("127.0.0.1", port or 0)))
        return bool(taken)

    eventually(take)  # An exporter needs longer to start than this to bind.

    def problem() -> str:
        endpoint = read_endpoint(runtime_dir)
        return "" if endpoint is None or endpoint.pid == exporter.pid else endpoint.problem

    eventually(lambda: f"Port {port}" in problem())
    taken[0].close()
    assert serving(runtime_dir, unlike=exporter.pid).url == exporter.url


def test_a_rank_publishes_while_the_exporter_is_stopped(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("model", CHANGING_RANK)
    exporter = serving(runtime_dir)
    os.kill(exporter.pid, signal.SIGSTOP)
    assert rank.stdin is not None
    for _ in range(1500):
        rank.stdin.write("\n")
    rank.stdin.flush()
    eventually(lambda: "1500" in versions(runtime_dir))
    os.kill(exporter.pid, signal.SIGCONT)
    assert exporter.url is not None
    with urllib.request.urlopen(exporter.url, timeout=LIMIT) as answer:
        assert b"sglang_weight_version{" in answer.read()


def versions(runtime_dir: RuntimeDir) -> list[str]:
    return [snapshot.weight_version for _, snapshot in SnapshotReader(runtime_dir).read()]


def test_where_no_thread_can_be_started_the_rank_is_served_by_another(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    refused = start_rank("model", NO_THREADS + CHANGING_RANK)
    eventually(lambda: versions(runtime_dir) == ["0"])
    start_rank("second", CHANGING_RANK)
    exporter = serving(runtime_dir)
    assert exporter.url is not None
    with urllib.request.urlopen(exporter.url, timeout=LIMIT) as answer:
        assert b"sglang_weight_exporter_ranks 2.0" in answer.read()
    assert refused.stdin is not None
    refused.stdin.write("\n")
    refused.stdin.flush()
    eventually(lambda: sorted(versions(runtime_dir)) == ["0", "1"])
    refused.kill()
    output, _ = refused.communicate()
    assert "can't start new thread" in output


def test_where_files_cannot_be_locked_nothing_is_published_and_it_is_said(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("model", NO_LOCKS + CHANGING_RANK)
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()
    assert rank.stdout is not None
    assert "No locks available" in rank.stdout.readline()
    assert rank.poll() is None
    assert versions(runtime_dir) == []


def test_ranks_in_containers_of_their_own_share_one_directory(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    """Each has its own process ids: nobody can be told dead or alive by his."""
    isolated = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*isolated, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to be root where processes may have namespaces of their own")
    first = start_rank("first", CHANGING_RANK, inside=isolated)
    exporter = serving(runtime_dir)
    second = start_rank("second", CHANGING_RANK, inside=isolated)
    eventually(lambda: versions(runtime_dir) == ["0", "0"])
    second.kill()
    second.communicate()
    eventually(lambda: versions(runtime_dir) == ["0"])
    # With the first one's container its exporter ends as well; a third takes over.
    third = start_rank("third", CHANGING_RANK, inside=isolated)
    eventually(lambda: versions(runtime_dir) == ["0", "0"])
    first.kill()
    first.communicate()

    def is_served() -> bool:
        assert exporter.url is not None
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(exporter.url, timeout=LIMIT) as got,
        ):
            return b"sglang_weight_exporter_ranks 1.0" in got.read()
        return False

    eventually(is_served)
    assert third.poll() is None


@pytest.mark.slow
def test_the_exporter_ends_with_the_last_rank(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("only")
    exporter = serving(runtime_dir)
    rank.kill()
    rank.communicate()
    # 10 seconds, in which an engine that starts again would find its endpoint.
    eventually(lambda: not Path(f"/proc/{exporter.pid}").exists() or _is_zombie(exporter.pid))
    assert read_endpoint(runtime_dir) is None
    assert not list(runtime_dir.ranks.iterdir())


def test_the_exporter_outlives_the_engine_whose_processes_are_all_killed(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("only")
    exporter = serving(runtime_dir)
    # As SGLang's `kill_process_tree` finds them.
    descendants = psutil.Process(rank.pid).children(recursive=True)
    assert exporter.pid not in {child.pid for child in descendants}
    for process in (*descendants, psutil.Process(rank.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    rank.communicate()
    assert exporter.url is not None
    with urllib.request.urlopen(exporter.url, timeout=LIMIT) as answer:
        assert b"sglang_weight_exporter_build_info" in answer.read()


@pytest.mark.slow
def test_a_directory_that_was_removed_and_made_again_has_one_owner(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    start_rank("first")
    original = serving(runtime_dir)
    shutil.rmtree(runtime_dir.path)
    start_rank("second")
    other = serving(runtime_dir, unlike=original.pid)
    eventually(lambda: not psutil.pid_exists(original.pid) or _is_zombie(original.pid))
    assert other.url == original.url
    assert serving(runtime_dir).pid == other.pid


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["*", "ranks/*/*", "ranks/*/lock"])
def test_a_rank_whose_files_a_cleaner_removed_is_back_without_an_update(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank], removed: str
) -> None:
    start_rank("model", CHANGING_RANK)
    original = serving(runtime_dir)
    for path in list(runtime_dir.path.glob(removed)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    replaced = serving(runtime_dir, unlike=original.pid)
    assert replaced.url is not None

    def is_served() -> bool:
        assert replaced.url is not None
        with urllib.request.urlopen(replaced.url, timeout=LIMIT) as answer:
            return b"sglang_weight_exporter_ranks 1.0" in answer.read()

    eventually(is_served)
    assert serving(runtime_dir).pid == replaced.pid


@pytest.mark.slow
def test_a_static_rank_is_back_after_its_directory_was_removed(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    start_rank("static", CHANGING_RANK)
    original = serving(runtime_dir)
    shutil.rmtree(runtime_dir.path)
    serving(runtime_dir, unlike=original.pid)
    ((_, snapshot),) = SnapshotReader(runtime_dir).read()
    assert snapshot.engine.model_name == "static"
    assert [role.name for role in snapshot.roles] == ["target"]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_an_exporter_that_cannot_start_says_why_once_and_leaves_the_rank_alone(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = (
        "import os",
        "open(os.environ['TRIES'], 'a').write('x')",
        "raise ImportError('broken')",
    )
    (broken / "uvicorn.py").write_text("\n".join(lines))
    tries = tmp_path / "tries"
    rank = start_rank("rank", PYTHONPATH=str(broken), TRIES=str(tries))
    eventually(lambda: tries.exists() and len(tries.read_text()) >= 3)
    assert rank.poll() is None
    rank.kill()
    output, _ = rank.communicate()
    # In one piece, from the first line to the last.
    assert re.fullmatch(
        r"sglang_weight_exporter: The exporter ends because of an error\.\n"
        r"Traceback .*\n(?:  .*\n)+ImportError: broken\n",
        output,
    ), output


def send_garbage(endpoint: ExporterEndpoint, requests: int) -> None:
    """Requests that are none: the exporter complains of each."""
    assert endpoint.url is not None
    address = urllib.parse.urlsplit(endpoint.url)
    for _ in range(requests):
        with socket.create_connection(
            (address.hostname, address.port or 0), timeout=LIMIT
        ) as client:
            client.sendall(b"no request\r\n\r\n")
            client.recv(1024)


def test_a_flood_of_complaints_is_a_few_lines_in_the_log_of_the_rank(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("only")
    send_garbage(serving(runtime_dir), 500)
    rank.kill()
    output, _ = rank.communicate()
    assert 1 <= output.count("Invalid HTTP request") <= 5


def test_an_exporter_goes_on_when_the_rank_that_reads_its_log_is_stopped(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank]
) -> None:
    rank = start_rank("only")
    exporter = serving(runtime_dir)
    rank.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, rank.pid, os.WSTOPPED | os.WNOWAIT)  # Until then it reads on.
    # The pipe is full, as after hours of complaints.
    pipe = os.open(f"/proc/{exporter.pid}/fd/1", os.O_WRONLY | os.O_NONBLOCK)
    for content in (b"x" * 64 + b"\n", b"\n"):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(pipe, content)
    send_garbage(exporter, 3)
    assert exporter.url is not None
    with urllib.request.urlopen(exporter.url, timeout=LIMIT) as answer:
        assert b"sglang_weight_exporter_build_info" in answer.read()
    rank.send_signal(signal.SIGCONT)
    eventually(lambda: not any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4))))
    os.close(pipe)
    # What was not read in time is counted with what is.
    send_garbage(exporter, 1)
    impatience = threading.Timer(LIMIT, rank.kill)
    impatience.start()
    assert rank.stdout is not None
    assert any("3 messages before this one were not read" in line for line in rank.stdout)
    impatience.cancel()


def test_what_engines_may_differ_in_does_not_reach_the_exporter(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank], tmp_path: Path
) -> None:
    """It goes by what each rank says: files of two engines in one directory have the same names,
    and two trainers count versions alike."""
    names = [f"SGLANG_WEIGHT_EXPORTER_{name}_DIR" for name in ("METADATA", "REFERENCE", "MANIFEST")]
    start_rank("rank", **{name: str(tmp_path) for name in names})
    environ = Path(f"/proc/{serving(runtime_dir).pid}/environ").read_text().split("\0")
    assert not [entry for entry in environ if entry.partition("=")[0] in names]


def test_sglangs_environment_does_not_reach_the_exporter(
    runtime_dir: RuntimeDir, start_rank: Callable[..., Rank], tmp_path: Path
) -> None:
    multiprocess = tmp_path / "prometheus"
    multiprocess.mkdir()
    start_rank("rank", PROMETHEUS_MULTIPROC_DIR=str(multiprocess))
    exporter = serving(runtime_dir)
    environ = Path(f"/proc/{exporter.pid}/environ").read_bytes().split(b"\0")
    assert not [entry for entry in environ if entry.startswith(b"PROMETHEUS_MULTIPROC_DIR=")]
    assert not list(multiprocess.iterdir())
