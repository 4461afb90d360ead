# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify`` and ``manifest`` of ranks that are written as engines write them.

That engines write so is what the tests with real engines show.
"""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import msgspec
from http_servers import Handler, LocalServer
from published import ROWS, PublishedRank
from safetensors_files import write
from waiting import LIMIT, eventually

from sglang_weight_exporter import cli, fingerprint
from sglang_weight_exporter.cli import verify
from sglang_weight_exporter.records.engine import Ranks
from sglang_weight_exporter.store.tables import Table, TableReader
from sglang_weight_exporter.weight_table import Row, WeightTable, table_of_rows

CHANGED = "layers.1.w"


def holding(seed: str, **others: str) -> WeightTable:
    """A table whose tensors hold something else for each seed; ``others``: of a name in words."""
    taken = {row.name: fingerprint.of_bytes((seed + row.name).encode()) for row in ROWS}
    taken |= {name: fingerprint.of_bytes(held.encode()) for name, held in others.items()}
    return msgspec.structs.replace(
        table_of_rows(ROWS, role="target", captured_at=time.time()),
        fingerprints=bytes.fromhex("".join(taken[row.name] for row in ROWS)),
        fingerprint=fingerprint.of_rank(taken),
    )


def command(name: str, host: Path, *arguments: str | Path) -> list[str]:
    words = [sys.executable, "-m", "sglang_weight_exporter", name, "--runtime-dir", host]
    return list(map(str, [*words, *arguments]))


def run(name: str, host: Path, *arguments: str | Path, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        command(name, host, *arguments),
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return done.returncode, done.stdout + done.stderr


#: A rank that nobody holds has let go of its lock, which is to have ended.
_ALIVE: list[PublishedRank] = []


def rank(host: Path, *, tp: int = 0, tp_size: int = 2, engine: str = "30000") -> PublishedRank:
    made = PublishedRank(host, engine=engine, ranks=Ranks(tp=tp))
    made.engine = msgspec.structs.replace(made.engine, tp_size=tp_size, pp_size=1, ep_size=1)
    _ALIVE.append(made)
    return made


def test_a_rank_of_one_host_beside_its_replica_on_another(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    rank(here).publish(table=holding("a"))
    replica, shard = rank(there), rank(there, tp=1)
    replica.publish(table=holding("a"))
    shard.publish(table=holding("another part"))
    file = tmp_path / "rank.json"
    assert run("manifest", here, "--rank", "0", "-o", file) == (0, "")
    status, text = run("verify", there, "--recorded", "--manifest", file)
    assert status == 0, text
    assert f"{len(ROWS)} equal, 0 different" in text
    assert "tp 1 pp 0  target  since its load: no manifest is of this part" in text
    replica.publish(table=holding("a", **{CHANGED: "other"}))
    status, text = run("verify", there, "--recorded", "--manifest", file)
    assert status == 1, text
    assert f"different  {CHANGED}" in text
    assert text.count("different  ") == 1


def test_each_rank_of_an_engine_beside_its_own_manifest(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    files = []
    ranks = []
    for tp in range(2):
        for host in (here, there):
            ranks.append(rank(host, tp=tp))
            ranks[-1].publish(table=holding(str(tp)))
        files.append(tmp_path / f"{tp}.json")
        assert run("manifest", here, "--rank", str(tp), "-o", files[-1])[0] == 0
    chosen = [word for file in files for word in ("--manifest", file)]
    status, text = run("verify", there, "--recorded", *chosen)
    assert status == 0, text
    assert text.count(f"{len(ROWS)} equal, 0 different") == 2


def test_an_engine_that_is_cut_otherwise_is_not_compared(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    both = rank(here), rank(there, tp_size=4), rank(there, engine="30001")
    for number, each in enumerate(both):
        each.publish(table=holding(str(number)))
    file = tmp_path / "rank.json"
    assert run("manifest", here, "--rank", "0", "-o", file)[0] == 0
    status, text = run("verify", there, "--recorded", "--engine", "30000", "--manifest", file)
    assert status == 2
    assert "target of tiny, tp 0 of 2, pp 0 of 1, ep 0 of 1" in text
    status, text = run("verify", there, "--recorded")
    assert status == 2, text
    assert "no two ranks here that should hold the same" in text


@pytest.mark.parametrize("other", ["quantization", "sglang_version"])
def test_what_holds_other_bytes_for_a_reason_is_no_replica(tmp_path: Path, other: str) -> None:
    """As the alert has it: quantized otherwise, or packed by another release."""
    both = rank(tmp_path), rank(tmp_path, engine="30001")
    if other == "quantization":
        both[1].role = msgspec.structs.replace(both[1].role, quantization="fp8")
    else:
        both[1].engine = msgspec.structs.replace(both[1].engine, sglang_version="0.5.9")
    for number, each in enumerate(both):
        each.publish(table=holding(str(number)))
    status, text = run("verify", tmp_path, "--recorded")
    assert status == 2, text
    assert "no two ranks here that should hold the same" in text


def test_a_manifest_is_of_one_rank_with_fingerprints(tmp_path: Path) -> None:
    ranks = rank(tmp_path), rank(tmp_path, tp=1)
    ranks[0].publish(table=holding("a"))
    ranks[1].publish()
    for arguments, said in (
        (("--rank", "pp=0"), "2 are chosen"),
        (("--rank", "7"), "No table was chosen"),
        (("--rank", "1"), "has no fingerprints"),
        ((), "Name a checkpoint, or a running rank"),
        (("model", "--rank", "0"), "and not both"),
    ):
        status, text = run("manifest", tmp_path, *arguments)
        assert status == 2
        assert said in text
    status, text = run("manifest", tmp_path, "--rank", "0", "--weight-version", "7")
    manifest = json.loads(text)
    assert manifest["weight_version"] == "7"
    assert manifest["tensors"].keys() == {row.name for row in ROWS}
    ranks[0].release_memory()
    assert run("manifest", tmp_path, "--rank", "0")[0] == 2


def test_what_changed_without_an_update_is_named(tmp_path: Path) -> None:
    alone = rank(tmp_path)
    alone.publish(table=holding("a", **{CHANGED: "other"}), modified=(CHANGED,))
    status, text = run("verify", tmp_path, "--recorded")
    assert status == 1, text
    assert f"changed without an update  {CHANGED}" in text


def test_watching_says_what_is_new_and_no_more(tmp_path: Path) -> None:
    replicas = rank(tmp_path), rank(tmp_path, engine="30001")
    for each in replicas:
        each.publish(table=holding("a"))
    output = tmp_path / "output"
    with output.open("w") as file:
        watching = subprocess.Popen(
            command("verify", tmp_path, "--recorded", "--watch", "0.1"), stdout=file, stderr=file
        )
    try:
        eventually(
            lambda: f"{len(ROWS)} equal, 0 different" in output.read_text(), what="a capture"
        )
        replicas[1].publish(table=holding("a", **{CHANGED: "other"}))
        eventually(lambda: f"different  {CHANGED}" in output.read_text(), what="the difference")
        replicas[1].publish(table=holding("a"))
        eventually(lambda: "since update 3" in output.read_text(), what="the third capture")
    finally:
        watching.terminate()
    assert watching.wait(LIMIT) == 1  # Something differed.
    text = output.read_text()
    assert [text.count(f"since {since}\n") for since in ("update 2", "update 3")] == [1, 1]
    assert text.count("equal, ") == 3


def test_a_watch_outlives_engines_that_end(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file:
        watching = subprocess.Popen(
            command("verify", tmp_path, "--recorded", "--watch", "0.1"), stdout=file, stderr=file
        )
    try:
        eventually(lambda: "No rank is alive here" in output.read_text(), what="nothing is here")
        replicas = rank(tmp_path), rank(tmp_path, engine="30001")
        for each in replicas:
            each.publish(table=holding("a"))
        eventually(lambda: "equal, 0 different" in output.read_text(), what="an engine came")
    finally:
        watching.terminate()
    assert watching.wait(LIMIT) == 2


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, seconds: str) -> None:
    status, text = run("verify", tmp_path, f"--watch={seconds}")
    assert status == 2
    assert "--watch" in text


# --- the request that has an engine capture ------------------------------------------------------


@contextlib.contextmanager
def checker(
    capture: Callable[[], object], answer: int = 200, key: str = "", body: bytes = b""
) -> Iterator[tuple[str, list[Handler]]]:
    """An engine's ``/set_internal_state``: its address, and what it was asked."""
    asked: list[Handler] = []

    class Checker(Handler):
        def do_POST(self) -> None:
            asked.append(self)
            self.body = json.loads(self.read_body())
            code, content = answer, body
            if key and self.headers["Authorization"] != f"Bearer {key}":
                code, content = 401, b'{"error":"Unauthorized"}'  # As SGLang's ``utils/auth.py``.
            elif self.path == "/set_internal_state" and answer == 200:
                capture()
            self.reply(content, code)

    with LocalServer(Checker) as server:
        yield server.url, asked


def keys(asked: list[Handler]) -> list[str | None]:
    return [request.headers["Authorization"] for request in asked]


def test_the_engine_is_asked_where_its_settings_say(tmp_path: Path) -> None:
    """Past any proxy, which neither reaches an engine on this host nor is to know its key."""
    alone = rank(tmp_path, engine="1")
    capture = lambda: alone.publish(table=holding("a"), modified=())  # noqa: E731
    with checker(capture, key="s3cret") as (url, asked):
        alone.engine = msgspec.structs.replace(alone.engine, url=url)
        alone.publish(table=holding("a"))
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9")
        status, text = run("verify", tmp_path, "--api-key", "s3cret", **proxies)
    assert (status, text.count("not captured again")) == (0, 0), text
    assert keys(asked) == [None, "Bearer s3cret"]


@contextlib.contextmanager
def read_first(late: PublishedRank, then: Callable[[], object]) -> Iterator[None]:
    """In this process: once a rank's table has been read, something happens."""
    read = TableReader.read
    happened: list[object] = []

    def read_and_go_on(reader: TableReader, timeout: float = 0.0) -> Table:
        table = read(reader, timeout)
        if reader.directory.rank_id == late.store.rank_id and not happened:
            happened.append(then())
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableReader, "read", read_and_go_on)
        yield
    assert happened


def two_ranks(host: Path) -> tuple[PublishedRank, PublishedRank]:
    """Of one engine, which answers when its first rank has captured."""
    ranks = rank(host), rank(host, tp=1)
    for tp, each in enumerate(ranks):
        each.publish(table=holding(str(tp)))
    return ranks


def test_the_other_ranks_of_an_engine_that_has_captured_are_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, late = two_ranks(tmp_path)
    with (
        checker(lambda: first.publish(table=holding("0"), modified=())) as (url, _),
        read_first(late, lambda: late.publish(table=holding("1"), modified=(CHANGED,))),
    ):
        status = cli.main(["verify", "--runtime-dir", str(tmp_path), "--url", url])
    said = capsys.readouterr()
    assert status == 1, said  # And not 2, with what was left then.
    assert f"changed without an update  {CHANGED}" in said.out
    assert "not captured again" not in said.err


def test_a_rank_that_captures_nothing_is_waited_for_no_longer_than_it_may_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.OTHER_RANKS_SECONDS == 10
    monkeypatch.setattr(verify, "OTHER_RANKS_SECONDS", 0.2)
    first, _ = two_ranks(tmp_path)
    with checker(lambda: first.publish(table=holding("0"))) as (url, _):
        status = cli.main(["verify", "--runtime-dir", str(tmp_path), "--url", url])
    said = capsys.readouterr()
    assert status == 2, said
    assert said.err.count("not captured again") == 1
    assert "tp 1 pp 0  target  since its load: not captured again" in said.err


def test_an_update_that_stays_open_is_said_after_ten_seconds(tmp_path: Path) -> None:
    """No fingerprints are taken inside one; nobody is asked, and nothing is called different."""
    alone = rank(tmp_path)
    alone.publish(table=holding("a"))
    alone.begin_update(started_at=time.time() - 60.0)
    with checker(lambda: None) as (url, asked):
        status, text = run("verify", tmp_path, "--url", url, "--wait", "0.2")
    assert status == 2, text
    assert "engine 30000, tp 0 pp 0, has been open for 6" in text
    assert "did not end in the 0.2 s that this waited" in text
    assert (asked, text.count("\n")) == ([], 1)
    assert "default: 10" in " ".join(run("verify", tmp_path, "--help")[1].split())


@pytest.mark.parametrize("ends", ["with its session", "for want of calls"])
def test_the_end_of_an_open_update_is_awaited_before_the_engine_is_asked(
    tmp_path: Path,
    ends: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That nobody will report is over after ten seconds without a call, as everywhere else."""
    alone, seen = rank(tmp_path), list[float | None]()
    alone.publish(table=holding("a"))
    if ends == "with its session":
        alone.begin_update()
    else:
        last = {"last_call_at": time.time() - 9.5, "idle_seconds": 10.0}
        alone.begin_update(started_at=time.time() - 60.0, calls=3, **last)
        alone.store.unlock_table()
    updating_since = verify._updating_since

    def see(reader: TableReader) -> float | None:
        seen.append(updating_since(reader))
        if ends == "with its session" and len(seen) == 1:
            alone.publish(table=holding("b"))
        return seen[-1]

    monkeypatch.setattr(verify, "_updating_since", see)
    with checker(lambda: alone.publish(table=holding("b"))) as (url, asked):
        status = cli.main(["verify", "--runtime-dir", str(tmp_path), "--url", url])
    said = capsys.readouterr()
    assert status == 0, said
    assert (len(asked), said.err) == (1, "")
    assert seen[0] is not None
    assert seen[-1] is None


def parts(asked: list[Handler]) -> list[list[int]]:
    """Which part of how many each request was for."""
    return [list(request.body["server_args"].values()) for request in asked]  # type: ignore[attr-defined]


def test_one_capture_is_for_all_of_it(tmp_path: Path) -> None:
    alone = rank(tmp_path)
    alone.publish(table=holding("a"))
    with checker(lambda: alone.publish(table=holding("a"))) as (url, asked):
        run("verify", tmp_path, "--url", url)
    assert parts(asked) == [[0, 1]]


def test_a_watch_asks_for_parts_of_two_milliseconds(tmp_path: Path) -> None:
    """Spread over the time of one capture, whatever each takes."""
    alone = rank(tmp_path)

    def publish(modified: tuple[str, ...] = ()) -> None:
        table = msgspec.structs.replace(holding("a"), fingerprint_seconds=0.0091)
        alone.publish(table=table, modified=modified)

    def capture() -> None:
        if len(asked) % 5 == 0:
            publish(() if len(asked) < 10 else (CHANGED,))

    publish()
    output = tmp_path / "output"
    with checker(capture) as (url, asked), output.open("w") as file:
        watching = subprocess.Popen(
            command("verify", tmp_path, "--watch", "0.5", "--url", url), stdout=file, stderr=file
        )
        try:
            eventually(lambda: "changed without" in output.read_text(), what="the second capture")
        finally:
            watching.terminate()
        assert watching.wait(LIMIT) == 1
    assert parts(asked)[:10] == [[part, 5] for part in range(5)] * 2
    text = output.read_text()
    assert "tensors captured" in text
    assert "not captured again" not in text


def test_an_engine_without_a_key_gets_none(tmp_path: Path) -> None:
    alone = rank(tmp_path)
    alone.publish(table=holding("a"))
    with checker(lambda: alone.publish(table=holding("a"))) as (url, asked):
        assert run("verify", tmp_path, "--url", url, "--api-key", "s3cret")[0] == 0
    assert keys(asked) == [None]


STRANGER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.headers["Authorization"], flush=True)
        self.send_response(401)
        self.send_header("Content-Length", "24")
        self.end_headers()
        self.wfile.write(b'{"error":"Unauthorized"}')
server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_stranger_at_the_engines_port_gets_no_key(tmp_path: Path) -> None:
    """An engine of another network namespace, say, whose address means somebody else here. No
    ancestor of the rank listens there, so even an answer like SGLang's is not enough."""
    alone = rank(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", STRANGER], stdout=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout is not None
        url = f"http://127.0.0.1:{it.stdout.readline().strip()}"
        alone.engine = msgspec.structs.replace(alone.engine, url=url)
        alone.publish(table=holding("a"))
        status, text = run("verify", tmp_path, "--api-key", "s3cret")
        it.terminate()
        heard = it.stdout.read()
    assert status == 2, text
    assert "is no process of this engine that can be seen here, so it did not get the key" in text
    assert heard == "None\n"


@pytest.mark.parametrize(
    ("answer", "body"), [(401, b"who are you?"), (403, b'{"error":"Forbidden"}'), (302, b"")]
)
def test_what_does_not_answer_as_an_engine_gets_no_key(
    tmp_path: Path, answer: int, body: bytes
) -> None:
    rank(tmp_path).publish(table=holding("a"))
    with checker(lambda: None, answer, body=body) as (url, asked):
        assert run("verify", tmp_path, "--url", url, "--api-key", "s3cret")[0] == 2
    assert keys(asked) == [None]


def test_an_address_that_is_given_comes_before_the_settings(tmp_path: Path) -> None:
    alone = rank(tmp_path)
    alone.engine = msgspec.structs.replace(alone.engine, url="http://127.0.0.1:9")
    alone.publish(table=holding("a"))
    with checker(lambda: alone.publish(table=holding("a"))) as (url, asked):
        assert run("verify", tmp_path, "--url", url + "/")[0] == 0
    assert len(asked) == 1


@pytest.mark.parametrize("answer", [400, 401, 404, 500])
def test_an_engine_that_refuses_is_compared_as_it_was_left(tmp_path: Path, answer: int) -> None:
    replicas = rank(tmp_path), rank(tmp_path, engine="30001")
    for each in replicas:
        each.publish(table=holding("a"))
    with checker(lambda: None, answer) as (url, _):
        status, text = run("verify", tmp_path, "--url", url)
    assert status == 2, text  # Equal, and yet nobody knows what is there now.
    assert (
        f"could not be asked to capture its weights again (it answers with status {answer})" in text
    )
    assert text.count("not captured again") == 2


def test_what_speaks_no_http_is_said_and_is_no_difference(tmp_path: Path) -> None:
    class Greets(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"220 mail.example\r\n")

    replicas = rank(tmp_path), rank(tmp_path, engine="30001")
    for each in replicas:
        each.publish(table=holding("a"))
    with socketserver.TCPServer(("127.0.0.1", 0), Greets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        status, text = run("verify", tmp_path, "--url", url)
        server.shutdown()
    assert status == 2, text
    assert "0 different" in text
    assert "could not be asked to capture its weights again" in text


@pytest.mark.parametrize("url", ["127.0.0.1:30000", "file:///etc/passwd", "http://", "http://h:x"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    rank(tmp_path).publish(table=holding("a"))
    status, text = run("verify", tmp_path, "--url", url)
    assert status == 2
    assert "argument --url" in text


def test_a_directory_that_cannot_be_trusted_is_no_difference(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    assert run("verify", tmp_path / "open")[0] == 2
    assert run("manifest", tmp_path / "open", "--rank", "0")[0] == 2


# --- shares of a checkpoint -----------------------------------------------------------------------


def test_the_parts_of_a_model_are_counted_by_the_engines_settings(tmp_path: Path) -> None:
    """Not by the ranks that are here: those of a large engine are on several hosts."""
    whole = bytes(range(64))
    row = Row("w", 4096, 16, "bfloat16", (2, 4), (4, 1), "cuda:0", "parameter", 4096, 16)
    table = table_of_rows([row], role="target", captured_at=time.time())
    for tp in range(2):
        taken = fingerprint.of_bytes(whole[16 * tp : 16 * tp + 16])
        rank(tmp_path / "run", tp=tp, tp_size=4).publish(
            table=msgspec.structs.replace(
                table,
                fingerprints=bytes.fromhex(taken),
                fingerprint=fingerprint.of_rank({"w": taken}),
            )
        )
    write(tmp_path / "model.safetensors", {"w": ("BF16", [8, 4], whole)})
    status, text = run("verify", tmp_path / "run", "--recorded", "--checkpoint", tmp_path)
    assert status == 0, text
    assert text.count("1 equal, 0 different") == 2
