# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The exporter process on its port: what it answers, whom it outlasts, what it says.

Each test runs the real command in a process of its own.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import taken
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from serving import Exporter
from waiting import LIMIT, eventually

from sglang_weight_exporter import __version__
from sglang_weight_exporter.records.engine import Engine, Ranks
from sglang_weight_exporter.records.snapshot import Role, Snapshot
from sglang_weight_exporter.records.updates import UpdateInProgress
from sglang_weight_exporter.records.weights import WeightUsage
from sglang_weight_exporter.settings import DEFAULT_PORT, Settings
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def test_metrics_in_both_formats_compressed_or_not(
    serve: Callable[..., Exporter], rank: RankStore
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    status, headers, body = exporter.request("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parse_text(body.decode())}
    (sample,) = families["sglang_weight_bytes"].samples
    assert sample.value == 1000
    assert sample.labels["model_name"] == 'a \\ "model"'
    assert sample.labels["tp_rank"] == "3"

    status, headers, body = exporter.request("/metrics", accept=OPENMETRICS, accept_encoding="gzip")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert headers["content-encoding"] == "gzip"
    names = {family.name for family in parse_openmetrics(gzip.decompress(body).decode())}
    assert "sglang_weight_updates" in names


def test_a_rank_of_which_no_role_is_known_can_raise_an_alert(
    serve: Callable[..., Exporter], runtime_dir: RuntimeDir
) -> None:
    rank = RankStore(runtime_dir, "rank")
    rank.write_snapshot(
        Snapshot(
            rank_id="rank",
            pid=os.getpid(),
            started_at=1.0,
            engine=Engine(name="30000", instance="one", model_name="tiny"),
            ranks=Ranks(tp=3),
            hook_errors={"capture": 2},
            snapshot_seconds=0.5,
        )
    )
    exporter = serve()
    exporter.line("metrics are at")
    _, _, body = exporter.request("/metrics")
    found = {
        sample.name: sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
        if sample.labels.get("model_name") == "tiny" and sample.labels["tp_rank"] == "3"
    }
    assert found == {
        "sglang_weight_exporter_hook_errors_total": 2.0,
        "sglang_weight_exporter_snapshot_seconds": 0.5,
    }
    rank.close()


def test_the_exporter_says_what_it_costs_itself(
    serve: Callable[..., Exporter], rank: RankStore
) -> None:
    exporter = serve()
    exporter.line("metrics are at")

    def scrape() -> dict[str, float]:
        _, _, body = exporter.request("/metrics")
        families = parse_text(body.decode())
        return {each.name: each.value for family in families for each in family.samples}

    name = "sglang_weight_exporter_scrape_duration_seconds"
    began = time.monotonic()
    assert name not in scrape()
    waited = time.monotonic() - began
    found = scrape()
    assert 0 < found[name] < waited
    # Of the exporter's process, and of no rank.
    status = Path(f"/proc/{exporter.process.pid}/stat").read_text()
    since_boot = int(status.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    boot = float(re.findall(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[0])
    assert found["process_start_time_seconds"] == pytest.approx(boot + since_boot, abs=1)
    assert found["process_resident_memory_bytes"] > 0
    assert found["process_cpu_seconds_total"] > 0


# What `printf %s VERSION | sha256sum` begins with, in binary: its first 53 digits.
VERSION_IDS = {
    "step-42": 0b00011000111000010100111110101110001000101100000110010,
    "default": 0b00110111101010001110111011000001110011100001100101101,
    "12e4567": 0b01101101101000110011100110010001000000101101100010001,
    "nan": 0b10011011001011010101101101000110011110000111100000011,
    "42": 0b01110011010001110101110010110100000010100101011010001,
    "9007199254740993": 0b10100001110000110110011111000010100100010101100000110,
}


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("42", 42.0),
        ("step-42", None),
        ("default", None),
        ("12e4567", None),  # To `float` infinity.
        ("nan", None),
        ("9007199254740993", None),  # 2^53 + 1, which no float is.
    ],
)
def test_a_version_is_a_number_that_can_be_compared(
    version: str,
    number: float | None,
    serve: Callable[..., Exporter],
    rank: RankStore,
) -> None:
    rank.write_snapshot(
        Snapshot(
            rank_id="rank",
            pid=os.getpid(),
            started_at=1.0,
            engine=Engine(name="30000", instance="one"),
            roles=(Role(name="target", device="cpu"), Role(name="draft", device="cpu")),
            weight_version=version,
        )
    )
    exporter = serve()
    exporter.line("metrics are at")
    _, _, body = exporter.request("/metrics")
    families = {family.name: family for family in parse_text(body.decode())}
    (identified,) = families["sglang_weight_version_hash"].samples
    assert families["sglang_weight_version_id"].samples == [
        identified._replace(name="sglang_weight_version_id")
    ]
    assert identified.value == VERSION_IDS[version]
    assert int(identified.value) == VERSION_IDS[version]  # Nothing was rounded.
    assert identified.labels["role"] == "target"
    numbers = {sample.value for sample in families["sglang_weight_version"].samples}
    assert numbers == (set() if number is None else {number})


def test_other_pages_and_methods(serve: Callable[..., Exporter]) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    assert exporter.request("/healthz")[0] == 200
    status, headers, body = exporter.request("/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    said = subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "--version"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == f"sglang-weight-exporter {__version__}\n"
    assert f"exporter {__version__}<" in body.decode()
    for link in (b'href="/metrics"', b'href="/healthz"'):
        assert link in body
    for path in ("/metrics/", "/metric", "/favicon.ico", "/ranks", "//metrics"):
        assert exporter.request(path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = exporter.request("/metrics", method)
        assert status == 405
        assert headers["allow"] == "GET, HEAD"
    status, _, body = exporter.request("/metrics", "HEAD")
    assert (status, body) == (200, b"")


@pytest.fixture
def clients() -> Iterator[list[socket.socket]]:
    """To be filled; closed behind a test that fails too, whose traceback would keep them open."""
    opened: list[socket.socket] = []
    yield opened
    for client in opened:
        client.close()


@pytest.mark.slow
def test_idle_and_slow_clients_block_nobody_and_are_let_go(
    serve: Callable[..., Exporter], rank: RankStore, clients: list[socket.socket]
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    exporter.request("/metrics")
    threads, sockets = exporter.threads(), exporter.open_sockets()
    opened = (socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(300))
    clients.extend(opened)
    for client in clients[100:280]:  # Half a request, and never the rest.
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
    dribbling = clients[280:290]  # A request whose body comes byte by byte.
    for client in dribbling:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n")
    for client in clients[290:]:  # Many requests, and no answer is ever read.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
    assert exporter.request("/metrics")[0] == 200
    # None for a client. Its pool for what blocks grows when all of it is busy, to 32 at most.
    assert exporter.threads() <= threads + 32

    def let_go() -> bool:
        for client in dribbling:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"x")
        left = exporter.open_sockets()
        assert left <= sockets + 1, f"{left} sockets are still open"
        return True

    eventually(let_go, every=0.5)
    assert exporter.request("/metrics")[0] == 200


@pytest.mark.slow
def test_more_idle_connections_than_descriptors_end_nothing(
    serve: Callable[..., Exporter], rank: RankStore, clients: list[socket.socket]
) -> None:
    exporter = serve(descriptors=256)
    exporter.line("metrics are at")
    for _ in range(800):  # All at once, as they come when a network is back.
        clients.append(socket.socket())
        clients[-1].setblocking(False)
        clients[-1].connect_ex(("127.0.0.1", exporter.port))
    for _ in range(3):  # The exporter looks at its ranks in between.
        status, _, body = exporter.request("/metrics")
        assert status == 200
        assert b"sglang_weight_bytes{" in body
        time.sleep(1)
    assert exporter.process.poll() is None
    assert list(exporter.lines.queue) == []


def test_ranks_that_cannot_be_listed_are_none_this_time(
    serve: Callable[..., Exporter], runtime_dir: RuntimeDir
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    runtime_dir.ranks.rmdir()
    runtime_dir.ranks.write_text("")  # As root, permissions would refuse nothing.
    for _ in range(3):  # The exporter looks at its ranks in between.
        status, _, body = exporter.request("/metrics")
        assert status == 200
        assert b"sglang_weight_exporter_ranks 0.0" in body
        time.sleep(1)
    assert re.search(r"read_errors_total [1-9]", body.decode())
    exporter.line("cannot be listed")
    assert list(exporter.lines.queue) == []  # Said once.


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ('application/openmetrics-text; version="1.0.0"', "application/openmetrics-text"),
        ("application/openmetrics-text; version=x", "text/plain"),
        ("x", "text/plain"),
        ("text/plain; version=x", "text/plain"),
        ("application/openmetrics-text; q=0", "text/plain"),
        ("application/openmetrics-text; q=0.3, text/plain; q=0.5", "text/plain"),
        ("application/openmetrics-text; q=much", "text/plain"),
    ],
)
def test_what_a_client_accepts_is_followed(
    serve: Callable[..., Exporter], rank: RankStore, accept: str, content_type: str
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    status, headers, body = exporter.request(
        "/metrics", accept=accept, accept_encoding="gzip;q=0, identity"
    )
    assert status == 200
    assert headers["content-type"].startswith(content_type)
    assert headers["content-encoding"] is None
    assert b"sglang_weight_bytes{" in body


def test_all_ipv4_addresses_are_no_ipv6_address(serve: Callable[..., Exporter]) -> None:
    exporter = serve("--address", "0.0.0.0")
    exporter.line("metrics are at")
    assert exporter.request("/healthz")[0] == 200
    with pytest.raises(OSError):  # noqa: PT011 (refused, or no IPv6 here)
        socket.create_connection(("::1", exporter.port), timeout=LIMIT)


@pytest.mark.slow
def test_a_scrape_follows_every_change_of_a_rank(
    serve: Callable[..., Exporter], rank: RankStore
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    now = time.time()

    def scrape(**headers: str) -> dict[str, float]:
        body = exporter.request("/metrics", **headers)[2]
        text = gzip.decompress(body) if headers else body
        return {
            sample.name: sample.value
            for family in parse_text(text.decode())
            for sample in family.samples
            if sample.labels.get("source", "tensor") == "tensor"
        }

    for nbytes in (2000, 3000):
        rank.write_snapshot(
            Snapshot(
                rank_id="rank",
                pid=os.getpid(),
                started_at=1.0,
                engine=Engine(name="30000", instance="one"),
                roles=(
                    Role(
                        name="target",
                        device="cpu",
                        weights=(
                            WeightUsage(
                                device="cpu",
                                kind="parameter",
                                dtype="bfloat16",
                                nbytes=nbytes,
                                tensors=2,
                            ),
                        ),
                        in_progress=UpdateInProgress(
                            source="tensor",
                            started_at=now,
                            last_call_at=now,
                            calls=1,
                            idle_seconds=5.0,
                        ),
                    ),
                ),
            )
        )
        for headers in ({}, {"accept_encoding": "gzip"}):
            found = scrape(**headers)
            assert found["sglang_weight_bytes"] == nbytes
    # Nothing is written from here on: an update without an end is over when it has been idle.
    assert scrape(accept_encoding="gzip")["sglang_weight_updates_total"] == 0
    eventually(lambda: scrape(accept_encoding="gzip")["sglang_weight_updates_total"] > 0)
    assert scrape()["sglang_weight_updates_total"] == 1


def test_a_scrape_that_is_being_answered_is_not_let_go_for_connections_that_ask_nothing(
    serve: Callable[..., Exporter], rank: RankStore
) -> None:
    exporter = serve(descriptors=256)
    exporter.line("metrics are at")
    with socket.socket() as scraper:
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        scraper.connect(("127.0.0.1", exporter.port))
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
        scraper.sendall((request + b"\r\n") * 20 + request + b"Connection: close\r\n\r\n")
        assert scraper.recv(1)  # It takes the rest later.
        idle = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(300)]
        for client in idle[:50]:
            assert client.recv(1) == b""  # Let go.
        answers = b"H"
        while received := scraper.recv(65536):
            answers += received
        assert answers.count(b"HTTP/1.1 200 OK") == 21
    for client in idle:
        client.close()


def test_more_scrapes_at_once_than_the_limit_are_refused_in_words(
    serve: Callable[..., Exporter], rank: RankStore, runtime_dir: RuntimeDir
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    clients = []
    for _ in range(80):  # None of them takes its answer.
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", exporter.port))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        clients.append(client)

    def refused() -> bytes:
        status, _, body = exporter.request("/metrics")
        assert status == 503
        return body

    assert b"at once" in eventually(refused, every=0)
    assert exporter.request("/healthz")[0] == 200
    for client in clients:
        client.close()
    eventually(lambda: exporter.request("/metrics")[0] == 200)


@pytest.mark.slow
def test_a_taken_port_is_named_once_and_taken_when_it_is_free(
    serve: Callable[..., Exporter],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        exporter = serve(port=other.getsockname()[1])
        line = exporter.line("in use")
        assert "SGLANG_WEIGHT_EXPORTER_PORT" in line
        assert exporter.process.poll() is None
    exporter.line(f"metrics are at http://127.0.0.1:{exporter.port}/metrics")
    assert list(exporter.lines.queue) == []
    assert exporter.request("/metrics")[0] == 200


def test_a_port_that_only_root_may_take_is_named(serve: Callable[..., Exporter]) -> None:
    first_free = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first_free <= 80:
        pytest.skip(
            "needs a kernel that keeps ports below 80 for root (ip_unprivileged_port_start)"
        )
    # Also for root, who gives that right up.
    exporter = serve(port=80, inside=("setpriv", "--bounding-set=-net_bind_service"))
    line = exporter.line("may not listen on port 80")
    assert "SGLANG_WEIGHT_EXPORTER_PORT" in line
    assert exporter.process.poll() is None


def test_an_address_of_ipv6_alone(serve: Callable[..., Exporter]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs a host with IPv6")
    exporter = serve("--address", "::1")
    exporter.line(re.escape(f"metrics are at http://[::1]:{exporter.port}/metrics"))
    with socket.create_connection(("::1", exporter.port), timeout=LIMIT) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.recv(1024).startswith(b"HTTP/1.1 200")
    with pytest.raises(ConnectionRefusedError):
        exporter.request("/healthz")


def test_the_line_about_the_default_port_names_dcgm_exporter(
    serve: Callable[..., Exporter],
) -> None:
    with taken(DEFAULT_PORT):
        assert "dcgm-exporter" in serve(port=DEFAULT_PORT).line(f"Port {DEFAULT_PORT} .* in use")


def test_a_second_exporter_of_one_directory_says_so_and_ends(
    serve: Callable[..., Exporter],
) -> None:
    serve().line("metrics are at")
    second = serve()
    assert second.process.wait(LIMIT) == 1
    assert "Another exporter process serves" in second.line("Another")


def test_it_ends_at_once_when_it_is_asked_to(serve: Callable[..., Exporter]) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    exporter.request("/metrics")
    exporter.process.send_signal(signal.SIGTERM)
    assert exporter.process.wait(LIMIT) == 0


def test_a_rank_that_dies_is_gone_at_the_next_scrape_and_its_files_soon(
    serve: Callable[..., Exporter], rank: RankStore, runtime_dir: RuntimeDir
) -> None:
    exporter = serve()
    exporter.line("metrics are at")
    assert b"sglang_weight_bytes{" in exporter.request("/metrics")[2]
    rank.close()
    body = exporter.request("/metrics")[2]
    assert b"sglang_weight_bytes{" not in body
    assert b"sglang_weight_exporter_ranks 0.0" in body
    eventually(lambda: not list(runtime_dir.ranks.iterdir()), what="its files are removed")


@pytest.mark.slow
def test_a_thousand_dead_ranks_keep_no_scrape_waiting(
    serve: Callable[..., Exporter], rank: RankStore, runtime_dir: RuntimeDir
) -> None:
    for number in range(1000):
        dead = runtime_dir.ranks / f"dead-{number}"
        (dead / "events").mkdir(parents=True)
        for name in ("lock", "table.lock", "snapshot", "target-0.table"):
            (dead / name).touch()
    exporter = serve()
    exporter.line("metrics are at")
    left = [1000]
    while left[-1]:
        assert b"sglang_weight_bytes{" in exporter.request("/metrics")[2]
        left.append(len(list(runtime_dir.ranks.iterdir())) - 1)
    assert len(set(left)) > 3, f"nothing was served in between: {left}"


def test_files_of_a_rank_that_changes_nothing_look_used_to_cleaners(
    serve: Callable[..., Exporter], rank: RankStore, runtime_dir: RuntimeDir
) -> None:
    long_ago = time.time() - 20 * 86400
    files = [runtime_dir.path, *runtime_dir.path.rglob("*")]
    for path in files:
        os.utime(path, (long_ago, long_ago))
    serve().line("metrics are at")
    eventually(lambda: all(path.stat().st_atime > long_ago + 86400 for path in files))
    # Who follows files by the time of their last change has nothing to read again.
    assert (rank.path / "snapshot").stat().st_mtime == pytest.approx(long_ago)


@pytest.mark.parametrize(
    "variable", ["PORT=http", "PORT=0", "SERVE=maybe", "READER_WAIT_SECONDS=x"]
)
def test_an_unusable_setting_is_named_and_the_default_used(
    runtime_dir: RuntimeDir, variable: str
) -> None:
    name, _, value = f"SGLANG_WEIGHT_EXPORTER_{variable}".partition("=")
    result = subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "status"],
        env={
            **os.environ,
            "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": str(runtime_dir.path),
            name: value,
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert f"{name}='{value}' cannot be used" in result.stderr
    assert "the default" in result.stderr


def test_what_kubernetes_sets_for_a_service_of_this_name_is_named_as_that(
    runtime_dir: RuntimeDir, serve: Callable[..., Exporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`{SVCNAME}_PORT`, as Docker links had it: here of the Service `sglang-weight-exporter`. The
    exporter and each rank's log say it, and the port is the default."""
    value = "tcp://10.0.171.239:9400"
    monkeypatch.setenv("SGLANG_WEIGHT_EXPORTER_PORT", value)
    settings, (complaint,) = Settings.from_environ(os.environ)
    assert settings.port == DEFAULT_PORT
    exporter = serve()  # With a port of its own, so that it meets nobody's.
    said = exporter.line("SGLANG_WEIGHT_EXPORTER_PORT")
    exporter.line("metrics are at")
    for line in (complaint, said):
        assert f"{value!r} cannot be used" in line
        assert "a Service named sglang-weight-exporter" in line
        assert "enableServiceLinks: false" in line


def peak_bytes(exporter: Exporter) -> int:
    """The most memory that the process has had."""
    status = Path(f"/proc/{exporter.process.pid}/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024


@pytest.mark.slow
def test_answers_that_nobody_takes_are_bounded(
    serve: Callable[..., Exporter], runtime_dir: RuntimeDir
) -> None:
    kinds = [f"dtype{number}" for number in range(300)]
    stores = [RankStore(runtime_dir, f"rank{number}") for number in range(16)]
    for number, store in enumerate(stores):
        usages = tuple(
            WeightUsage(device="cpu", kind="parameter", dtype=each, nbytes=1, tensors=1)
            for each in kinds
        )
        store.write_snapshot(
            Snapshot(
                rank_id=f"rank{number}",
                pid=os.getpid(),
                started_at=1.0,
                engine=Engine(name="30000", instance="one", model_name="m" * 200),
                ranks=Ranks(tp=number),
                roles=(Role(name="target", device="cpu", weights=usages),),
            )
        )
    exporter = serve()
    exporter.line("metrics are at")
    text = len(exporter.request("/metrics")[2])
    assert text > 2**21
    before = peak_bytes(exporter)
    clients = []
    for _ in range(150):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", exporter.port))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        clients.append(client)
    # Those that take nothing are let go, and then everybody is served.
    eventually(lambda: exporter.request("/metrics")[0] == 200, what="an answer")
    eventually(lambda: exporter.open_sockets() < 50, what="the end of their connections")
    # Some of its own are under way at a time, and none for each client that waits.
    assert peak_bytes(exporter) - before < 150 * text / 2
    for client in clients:
        client.close()
    for store in stores:
        store.close()
