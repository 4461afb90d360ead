# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Two real engines that should serve the same, and a real Prometheus that notices when not."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, Installation
from monitoring import Monitoring
from ports import free_port
from waiting import eventually

pytestmark = pytest.mark.release("alerts")

WAITED_FOR = {
    "SGLangWeightUpdateChangedNothing",
    "SGLangWeightsChangedWithoutUpdate",
    "SGLangWeightReplicasDiffer",
    "SGLangKVCacheStale",
}

NORM = "model.norm.weight"
Pair = tuple[Engine, Engine]


@pytest.fixture(scope="module")
def pair(newest: Installation, checkpoints: tuple[Path, Path]) -> Iterator[Pair]:
    """Replicas on one host, behind one exporter."""
    with tempfile.TemporaryDirectory(prefix="replicas-") as directory:
        variables = {
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on",
            "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": f"{directory}/runtime",
            "SGLANG_WEIGHT_EXPORTER_REFERENCE_DIR": f"{directory}/references",
        }
        port = free_port()
        engines = [
            Engine(newest, checkpoints[0], variables=variables, exporter_port=port)
            for _ in range(2)
        ]
        try:
            for engine in engines:
                engine.start()
                engine.wait_until_ready()
            yield engines[0], engines[1]
        finally:
            for engine in engines:
                engine.stop()


@pytest.fixture(scope="module")
def monitoring(pair: Pair) -> Iterator[Monitoring]:
    target = {"sglang-weights": f"127.0.0.1:{pair[0].exporter_port}"}
    stack = Monitoring(
        Path(tempfile.mkdtemp(prefix="monitoring-")), target, hastened=WAITED_FOR
    ).start()
    try:
        fingerprints = "sglang_weight_fingerprint"
        eventually(lambda: len(stack.query(fingerprints)) == 2, what="both are scraped")
        yield stack
    finally:
        stack.stop()


def reload(engine: Engine, checkpoint: Path, **more: Any) -> None:
    body = {"model_path": str(checkpoint), **more}
    _, answer = engine.post("/update_weights_from_disk", body)
    assert answer["success"], answer


def numbers(pair: Pair) -> list[float]:
    scrape = pair[0].scrape()
    return [scrape.one("sglang_weight_fingerprint", engine=str(each.port)) for each in pair]


def fires(monitoring: Monitoring, name: str, **labels: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [
        alert for alert in monitoring.active_alerts(name, **labels) if alert["state"] == "firing"
    ]


def resolves(monitoring: Monitoring, name: str) -> None:
    eventually(lambda: not monitoring.active_alerts(name), what=f"{name} resolves")


def match(pair: Pair, engine: Engine) -> list[float]:
    name = "sglang_weight_reference_match"
    return [each.value for each in pair[0].scrape().series(name, engine=str(engine.port))]


def test_the_second_load_is_what_the_first_was(pair: Pair) -> None:
    """The first left it as the reference, and is compared with nothing."""
    eventually(lambda: match(pair, pair[1]) == [1], what="the second is compared")
    assert match(pair, pair[0]) == []
    status = pair[1].exporter_cli("status").stdout
    assert f"engine {pair[1].port}, tp 0 pp 0, target: the same" in status, status


def test_a_reload_of_the_same_checkpoint_is_an_update_that_changed_nothing(
    pair: Pair, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    name, labels = "SGLangWeightUpdateChangedNothing", {"engine": str(pair[0].port)}
    before = numbers(pair)
    assert before[0] == before[1]
    reload(pair[0], checkpoints[0])
    alert, *more = eventually(fires(monitoring, name), what=name)
    assert not more
    assert {"source": "disk", **labels}.items() <= alert["labels"].items()
    scrape = pair[0].scrape()
    counted = {"source": "disk", **labels}
    assert scrape.one("sglang_weight_updates_total", **counted) == 1
    assert scrape.one("sglang_weight_updates_without_change_total", **counted) == 1
    assert numbers(pair) == before
    resolves(monitoring, name)


def test_a_replica_that_missed_an_update_raises_an_alert_until_it_has_it(
    pair: Pair, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    name = "SGLangWeightReplicasDiffer"
    assert monitoring.active_alerts(name) == []
    reload(pair[0], checkpoints[1])
    one, other = numbers(pair)
    assert one != other
    (alert,) = eventually(fires(monitoring, name), what=name)
    assert f"engine {pair[1].port} on" in alert["annotations"]["description"]
    assert "instance" not in alert["labels"]
    done = pair[0].exporter_cli("verify")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "different  lm_head.weight" in done.stdout
    reload(pair[1], checkpoints[1])
    one, other = numbers(pair)
    assert one == other
    resolves(monitoring, name)
    # Another checkpoint is a change.
    assert monitoring.active_alerts("SGLangWeightUpdateChangedNothing") == []
    assert monitoring.active_alerts("SGLangWeightsChangedWithoutUpdate") == []


def test_a_bit_that_flipped_is_found_by_verify(pair: Pair, monitoring: Monitoring) -> None:
    name, engine = "SGLangWeightsChangedWithoutUpdate", pair[1]
    done = engine.exporter_cli("table", "--engine", str(engine.port), "--format", "json")
    (table,) = json.loads(done.stdout)["tables"]
    (address,) = [int(row["data_ptr"], 16) for row in table["tensors"] if row["name"] == NORM]

    def flip() -> None:
        """Past SGLang and torch, in the engine's own memory."""
        with Path(f"/proc/{table['pid']}/mem").open("r+b", buffering=0) as memory:
            value = os.pread(memory.fileno(), 1, address + 11)[0]
            assert os.pwrite(memory.fileno(), bytes([value ^ 4]), address + 11) == 1

    before = numbers(pair)
    flip()
    try:
        assert numbers(pair) == before  # Nothing was captured.
        done = engine.exporter_cli("verify", "--engine", str(engine.port))
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"changed without an update  {NORM}" in done.stdout
        (alert,) = eventually(fires(monitoring, name), what=name)
        assert alert["labels"]["engine"] == str(engine.port)
    finally:
        flip()
    done = engine.exporter_cli("verify", "--engine", str(engine.port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed" not in done.stdout
    resolves(monitoring, name)


def test_a_bit_that_flipped_is_found_by_the_next_update(
    pair: Pair, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    """The capture before it, as a batch ran since the last one; after it nobody could tell."""
    name, engine = "SGLangWeightsChangedWithoutUpdate", pair[1]
    done = engine.exporter_cli("table", "--engine", str(engine.port), "--format", "json")
    (table,) = json.loads(done.stdout)["tables"]
    (address,) = [int(row["data_ptr"], 16) for row in table["tensors"] if row["name"] == NORM]
    with Path(f"/proc/{table['pid']}/mem").open("r+b", buffering=0) as memory:
        value = os.pread(memory.fileno(), 1, address)[0]
        assert os.pwrite(memory.fileno(), bytes([value ^ 1]), address) == 1
    prompt = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 2}}
    assert engine.post("/generate", prompt)[0] == 200
    engine.put_requests_away()
    reload(engine, checkpoints[1])
    one, other = numbers(pair)
    assert one == other
    (alert,) = eventually(fires(monitoring, name), what=name)
    assert alert["labels"]["engine"] == str(engine.port)
    # The update brought back what had been there before the bit flipped: that is a change.
    assert monitoring.active_alerts("SGLangWeightUpdateChangedNothing") == []


def test_what_was_never_wrong_raised_no_alert(pair: Pair, monitoring: Monitoring) -> None:
    assert (
        monitoring.query('ALERTS{alertname="SGLangWeightsChangedWithoutUpdate",during="release"}')
        == []
    )
    skipped = pair[0].scrape().sum("sglang_weight_fingerprint_skipped_total")
    assert skipped == 0
    modified = pair[0].scrape().sum("sglang_weight_tensors_altered_total", engine=str(pair[0].port))
    assert modified == 0


def versions(pair: Pair) -> list[float]:
    scrape = pair[0].scrape()
    return [scrape.one("sglang_weight_version_hash", engine=str(each.port)) for each in pair]


def test_a_replica_that_missed_a_version_is_named_until_it_has_it(
    pair: Pair, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    """Of versions that are no numbers."""
    name = "SGLangWeightReplicasDiffer"
    for engine in pair:
        reload(engine, checkpoints[0], weight_version="step-41")
    assert len(set(versions(pair))) == 1
    assert monitoring.active_alerts(name) == []
    reload(pair[0], checkpoints[1], weight_version="step-42")
    assert len(set(versions(pair))) == 2
    (alert,) = eventually(fires(monitoring, name), what=name)
    for engine in pair:
        assert f"such as engine {engine.port} on" in alert["annotations"]["description"]
    reload(pair[1], checkpoints[1], weight_version="step-42")
    assert len(set(versions(pair))) == 1
    resolves(monitoring, name)


def test_answers_from_the_cache_of_weights_that_are_gone(
    pair: Pair, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    name, engine = "SGLangKVCacheStale", pair[0]

    def cached_tokens() -> int:
        prompt = {"input_ids": list(range(3, 67)), "sampling_params": {"max_new_tokens": 2}}
        status, answer = engine.post("/generate", prompt)
        assert status == 200, answer
        return int(answer["meta_info"]["cached_tokens"])

    cached_tokens()
    reload(engine, checkpoints[0], weight_version="step-42", flush_cache=False)
    assert cached_tokens() > 0
    (alert,) = eventually(fires(monitoring, name), what=name)
    assert alert["labels"]["engine"] == str(engine.port)
    eventually(lambda: engine.flush_cache()[0] == 200, what="the cache is flushed")
    assert cached_tokens() == 0
    resolves(monitoring, name)
    reload(engine, checkpoints[1], weight_version="step-42")


def test_where_the_time_of_a_reload_went(pair: Pair) -> None:
    scrape, engine = pair[0].scrape(), str(pair[0].port)
    labels = {"engine": engine, "source": "disk"}
    seconds = scrape.sum("sglang_weight_update_phase_seconds_total", **labels)
    assert seconds == pytest.approx(
        scrape.one("sglang_weight_update_duration_seconds_sum", **labels), rel=0.01
    )
    assert scrape.one("sglang_weight_update_bytes_total", **labels) > 0
    assert "took" in pair[0].exporter_cli("status").stdout


def test_a_replica_that_was_restarted_serves_the_checkpoint_of_its_launch(
    pair: Pair, monitoring: Monitoring
) -> None:
    name = "SGLangWeightReplicasDiffer"
    resolves(monitoring, name)  # The test before had other weights in one of them for a moment.
    pair[1].terminate(15)
    pair[1].main.wait()
    pair[1].start()
    pair[1].wait_until_ready()
    assert len(set(versions(pair))) == 2
    (alert,) = eventually(fires(monitoring, name), what=name)
    assert f"such as engine {pair[1].port} on" in alert["annotations"]["description"]


def test_one_flipped_byte_in_a_copy_of_the_checkpoint_is_named_at_the_start(
    pair: Pair, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    engine, copy = pair[1], tmp_path / "copy"
    shutil.copytree(checkpoints[0], copy)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    at = json.loads(content[8 : 8 + length])[NORM]["data_offsets"][0]
    content[8 + length + at] ^= 1
    file.write_bytes(content)
    engine.terminate(15)
    engine.main.wait()
    engine.model = copy
    engine.start()
    engine.wait_until_ready()
    eventually(lambda: match(pair, engine) == [0], what="it is compared")
    done = engine.exporter_cli("status")
    assert f"its load left other bytes in {NORM} than another load" in done.stdout, done.stdout
    assert done.returncode == 1
