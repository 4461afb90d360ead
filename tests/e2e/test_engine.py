# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Real engines, from what SGLang has in memory to what a scrape of the exporter says.

Most tests run twice: on SGLang 0.5.23 with two data-parallel ranks, which loads the package as a
plugin and finds its .pth as well, and on 0.5.9, which knows no plugins and updates weights in
ModelRunner.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_model
from engines import Engine, Installation, Scrape, http_get
from waiting import LIMIT, eventually

README = Path(__file__).parents[2] / "README.md"
#: The release that the README's examples are of.
NEWEST = "0.5.23"
SOURCES = {"disk", "distributed", "tensor", "ipc", "p2p", "eplb", "external"}
# Without data parallelism SGLang has no dp_rank.
RANKS = {"engine": ("0", "1"), "old_engine": ("",)}
BFLOAT16 = 2
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass(frozen=True)
class Served:
    """An engine that serves, and the dp_rank labels of its ranks."""

    engine: Engine
    ranks: tuple[str, ...]


@pytest.fixture(params=["engine", pytest.param("old_engine", marks=pytest.mark.release("oldest"))])
def served(request: pytest.FixtureRequest) -> Served:
    return Served(request.getfixturevalue(request.param), RANKS[request.param])


def parameters_in_sglang(checkpoint: Path) -> tuple[int, int]:
    """How many parameters SGLang makes of a checkpoint, and their bytes.

    SGLang fuses q, k, v and gate, up into one parameter each; the bytes stay the same.
    """
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    header = tiny_model.safetensors_header(checkpoint)
    names = {".".join(fused.get(part, part) for part in name.split(".")) for name in header}
    return len(names), sum(size for _, size in header.values())


def kv_pool(engine: Engine) -> tuple[int, int]:
    """Tokens that fit in one rank's pool, and its bytes, from SGLang's own configuration.

    SGLang allocates one page more than the tokens it hands out, for padding.
    """
    info = engine.server_info()
    tokens, page = info["max_total_num_tokens"], info["page_size"]
    a_token = 2 * tiny_model.LAYERS * tiny_model.KV_HEADS * tiny_model.HEAD_DIM * BFLOAT16
    return tokens, (tokens + page) * a_token


def moves(before: Scrape, after: Scrape, name: str) -> dict[tuple[str, str], float]:
    """How much each (dp_rank, source) of a counter grew, where it did."""
    grown = {}
    for sample in after.series(name):
        labels = sample.labels
        change = sample.value - before.one(name, **labels)
        if change:
            grown[labels["dp_rank"], labels["source"]] = change
    return grown


def counted(served: Served, before: Scrape, name: str) -> Scrape:
    """The scrape in which a counter has grown on every rank."""

    def grown() -> Scrape:
        after = served.engine.scrape()
        assert len(moves(before, after, name)) >= len(served.ranks)
        return after

    return eventually(grown, what=f"{name} grown on every rank")


def test_every_rank_is_on_one_endpoint(served: Served) -> None:
    found = served.engine.scrape().series("sglang_weight_bytes")
    assert {sample.labels["dp_rank"] for sample in found} == set(served.ranks)
    assert {sample.labels["role"] for sample in found} == {"target"}
    assert {sample.labels["device"] for sample in found} == {"cpu"}
    assert {sample.labels["model_name"] for sample in found} == {str(served.engine.model)}
    assert {sample.labels["tp_rank"] + sample.labels["pp_rank"] for sample in found} == {"00"}
    assert len({sample.labels["engine"] for sample in found}) == 1


def test_parameters_equal_the_checkpoint(served: Served) -> None:
    tensors, size = parameters_in_sglang(served.engine.model)
    scrape = served.engine.scrape()
    for rank in served.ranks:
        parameters = {"dp_rank": rank, "kind": "parameter"}
        assert scrape.one("sglang_weight_bytes", dtype="bfloat16", **parameters) == size
        assert scrape.one("sglang_weight_tensors", dtype="bfloat16", **parameters) == tensors
        assert scrape.sum("sglang_weight_bytes", **parameters) == size
        assert scrape.sum("sglang_weight_tensors", **parameters) == tensors
        everything = scrape.sum("sglang_weight_bytes", dp_rank=rank)
        assert scrape.one("sglang_weight_resident_bytes", dp_rank=rank) == everything


def test_kv_pool_equals_its_configuration(served: Served) -> None:
    tokens, size = kv_pool(served.engine)
    scrape = served.engine.scrape()
    for rank in served.ranks:
        assert scrape.one("sglang_kv_pool_bytes", dp_rank=rank, pool="full") == size
        assert scrape.sum("sglang_kv_pool_bytes", dp_rank=rank) == size
        assert scrape.one("sglang_kv_pool_resident_bytes", dp_rank=rank) == size
        assert scrape.one("sglang_kv_pool_tokens", dp_rank=rank, pool="full") == tokens


def test_counters_exist_before_the_first_event(served: Served) -> None:
    scrape = served.engine.scrape()
    for name in ("updates_total", "update_failures_total", "update_calls_total"):
        for rank in served.ranks:
            found = scrape.series(f"sglang_weight_{name}", dp_rank=rank)
            assert {sample.labels["source"] for sample in found} == SOURCES, name


def test_an_update_from_disk_counts_once_on_each_rank(
    served: Served, checkpoints: tuple[Path, Path]
) -> None:
    once = {(rank, "disk"): 1.0 for rank in served.ranks}
    for checkpoint in reversed(checkpoints):  # to the other one, and back
        before, started = served.engine.scrape(), time.time()
        status, answer = served.engine.update_weights_from_disk(checkpoint)
        ended = time.time()
        assert status == 200, answer
        assert answer["success"] is True

        after = counted(served, before, "sglang_weight_updates_total")
        assert moves(before, after, "sglang_weight_updates_total") == once
        assert moves(before, after, "sglang_weight_update_calls_total") == once
        assert moves(before, after, "sglang_weight_update_duration_seconds_count") == once
        assert moves(before, after, "sglang_weight_update_failures_total") == {}
        for rank in served.ranks:
            changed = after.one("sglang_weight_last_update_timestamp_seconds", dp_rank=rank)
            loaded = after.one("sglang_weight_loaded_timestamp_seconds", dp_rank=rank)
            name = "sglang_weight_last_update_start_timestamp_seconds"
            assert loaded < started <= after.one(name, dp_rank=rank) <= changed <= ended
            took = after.one("sglang_weight_last_update_duration_seconds", dp_rank=rank)
            assert changed - after.one(name, dp_rank=rank) <= took <= ended - started
            assert after.one("sglang_weight_update_in_progress", dp_rank=rank) == 0


def test_a_reload_that_fails_counts_a_failure_and_no_update(served: Served, tmp_path: Path) -> None:
    before = served.engine.scrape()
    status, answer = served.engine.update_weights_from_disk(tmp_path / "not-there")
    assert status == 400
    assert answer["success"] is False

    after = counted(served, before, "sglang_weight_update_failures_total")
    once = {(rank, "disk"): 1.0 for rank in served.ranks}
    assert moves(before, after, "sglang_weight_update_failures_total") == once
    assert moves(before, after, "sglang_weight_updates_total") == {}
    kept = ("update_timestamp", "update_start_timestamp", "update_duration")
    for rank, which in itertools.product(served.ranks, kept):
        name = f"sglang_weight_last_{which}_seconds"
        assert after.one(name, dp_rank=rank) == before.one(name, dp_rank=rank)
    status_now = served.engine.exporter_cli("status")
    assert status_now.returncode == 1
    assert "failed" in status_now.stdout + status_now.stderr


def test_promtool_finds_nothing_to_say(served: Served) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=served.engine.scrape().text,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_openmetrics_and_gzip_by_negotiation(engine: Engine) -> None:
    url = engine.exporter_url + "/metrics"
    _, headers, body = http_get(url, headers={"Accept": OPENMETRICS})
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert body.rstrip().endswith(b"# EOF")
    _, headers, body = http_get(url, headers={"Accept-Encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    assert body[:2] == b"\x1f\x8b"


def test_no_address_leaves_by_http(served: Served) -> None:
    assert "0x" not in served.engine.scrape().text


def test_the_log_says_once_where_the_metrics_are(served: Served) -> None:
    lines = [
        line
        for line in served.engine.log().splitlines()
        if f":{served.engine.exporter_port}" in line
    ]
    assert len(lines) == 1, served.engine.log()


def test_status_is_well_once_an_update_succeeds(served: Served) -> None:
    code, answer = served.engine.update_weights_from_disk(served.engine.model)
    assert code == 200, answer
    status = served.engine.exporter_cli("status")
    assert status.returncode == 0, status.stdout + status.stderr
    assert f":{served.engine.exporter_port}/metrics" in status.stdout
    assert status.stdout.count(str(served.engine.model)) >= len(served.ranks)
    assert status.stdout.count("target") == len(served.ranks)
    assert status.stderr == ""
    if f"SGLang {NEWEST}" in status.stdout:
        (shown,) = re.findall(r"^  hooks .+$", README.read_text(encoding="utf-8"), re.MULTILINE)
        assert status.stdout.count(shown) == len(served.ranks), status.stdout


def test_status_without_an_engine_is_not_well(engine: Engine, tmp_path: Path) -> None:
    status = subprocess.run(
        [str(engine.installation.python), "-m", "sglang_weight_exporter", "status"],
        env=engine.environment | {"SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": str(tmp_path / "empty")},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert status.returncode == 1, status.stdout + status.stderr
    assert "Traceback" not in status.stderr


def test_sglang_metrics_have_the_same_names_with_and_without(
    engine: Engine, disabled_engine: Engine
) -> None:
    for one in (engine, disabled_engine):
        for _ in range(4):  # round robin: two a rank, and the second finds the first in the cache
            request = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
            status, answer = one.post("/generate", request)
            assert status == 200, answer
        one.put_requests_away()
        status, answer = one.update_weights_from_disk(one.model)
        assert status == 200, answer

    def same() -> bool:
        ours = Scrape.of(engine.url + "/metrics").names()
        theirs = Scrape.of(disabled_engine.url + "/metrics").names()
        # It comes with the first request that is aborted, as other tests of this engine do.
        assert ours - {"sglang:num_aborted_requests_total"} == theirs
        return any(name.startswith("sglang:weight_load") for name in ours)

    assert eventually(same)


def test_plugin_and_pth_are_both_there(newest: Installation) -> None:
    """What makes every count above, which moved by one, a test that hooks are installed once."""
    script = """
import importlib.metadata, os, sysconfig
print([e.name for e in importlib.metadata.entry_points(group="sglang.srt.plugins")])
print([n for n in os.listdir(sysconfig.get_path("purelib")) if n.endswith((".pth", ".start"))])
"""
    printed = subprocess.check_output([str(newest.python), "-c", script], text=True)
    assert "'sglang_weight_exporter'" in printed
    assert "'sglang_weight_exporter.pth'" in printed
    assert "'sglang_weight_exporter.start'" in printed


def test_switched_off_does_nothing(disabled_engine: Engine) -> None:
    assert not disabled_engine.runtime_dir.exists()
    assert disabled_engine.exporters() == []
    with pytest.raises(OSError, match="refused"):
        disabled_engine.scrape()


def test_what_sglangs_own_gauges_leave_out(engine: Engine, checkpoints: tuple[Path, Path]) -> None:
    """The README's comparison: both endpoints of one engine at the same moments."""

    def theirs(name: str) -> list[float]:
        scrape = Scrape.of(engine.url + "/metrics", timeout=LIMIT)
        return sorted(sample.value for sample in scrape.series(f"sglang:{name}"))

    def ours(name: str) -> float:
        return engine.scrape().sum(name, source="disk", role="target")

    memory = theirs("weight_memory_usage_gb")
    assert memory
    updates = ours("sglang_weight_updates_total")
    assert engine.update_weights_from_disk(checkpoints[0])[1]["success"]
    eventually(lambda: ours("sglang_weight_updates_total") == updates + 2)  # A rank each.
    took = eventually(lambda: theirs("weight_load_duration_seconds"))
    failures = ours("sglang_weight_update_failures_total")
    assert not engine.update_weights_from_disk(Path("/nowhere/at/all"))[1]["success"]
    eventually(lambda: ours("sglang_weight_update_failures_total") == failures + 2)
    # SGLang sets its gauge to what the failed reload took, and no other says that it failed.
    eventually(lambda: theirs("weight_load_duration_seconds") != took)
    assert ours("sglang_weight_updates_total") == updates + 2
    assert theirs("weight_memory_usage_gb") == memory
