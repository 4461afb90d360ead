# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Keys and values that outlive the weights that computed them, in a real engine.

What says that an answer was built on them is SGLang itself: ``cached_tokens`` of the answer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from engines import Engine, Scrape
from waiting import eventually

#: Longer than a page of any release.
PROMPT = list(range(3, 67))


@pytest.fixture(params=["engine", pytest.param("old_engine", marks=pytest.mark.release("oldest"))])
def serving(request: pytest.FixtureRequest) -> Engine:
    engine: Engine = request.getfixturevalue(request.param)
    return engine


def cached_tokens(engine: Engine) -> list[int]:
    """Ask each rank for the same continuation; how many tokens of the prompt came from a cache."""
    found = []
    for _ in ranks(engine.scrape()):  # Requests go around the data-parallel ranks.
        status, answer = engine.post(
            "/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 2}}
        )
        assert status == 200, answer
        found.append(int(answer["meta_info"]["cached_tokens"]))
    return found


def ranks(scrape: Scrape) -> list[str]:
    return sorted(sample.labels["dp_rank"] for sample in scrape.series("sglang_kv_cache_stale"))


def values(engine: Engine, name: str, **labels: str) -> list[float]:
    return [sample.value for sample in engine.scrape().series(f"sglang_kv_cache_{name}", **labels)]


def publishes(engine: Engine, name: str, expected: list[float], **labels: str) -> None:
    def is_so() -> bool:
        assert values(engine, name, **labels) == expected
        return True

    eventually(is_so, what=f"sglang_kv_cache_{name} of {expected}")


def flush(engine: Engine) -> None:
    def flushed() -> bool:  # Refused while a request of a moment ago is still being put away.
        status, answer = engine.flush_cache()
        assert status == 200, answer
        return True

    eventually(flushed, what="a cache that could be flushed")


def reload(engine: Engine, checkpoint: Path, **more: Any) -> None:
    engine.put_requests_away()
    body = {"model_path": str(checkpoint), **more}
    status, answer = engine.post("/update_weights_from_disk", body)
    assert (status, answer["success"]) == (200, True), answer


def test_a_reload_without_a_flush_leaves_a_stale_cache(
    serving: Engine, checkpoints: tuple[Path, Path]
) -> None:
    count = len(ranks(serving.scrape()))
    flush(serving)
    assert cached_tokens(serving) == [0] * count
    publishes(serving, "stale", [0] * count)
    assert all(tokens > 0 for tokens in cached_tokens(serving))  # By the weights that are there.
    publishes(serving, "stale", [0] * count)

    reload(serving, checkpoints[1], flush_cache=False)
    publishes(serving, "stale", [1] * count)
    assert all(tokens > 0 for tokens in cached_tokens(serving))  # By weights that are gone.
    publishes(serving, "stale", [1] * count)

    before, flushed_at = values(serving, "flushes_total"), time.time()
    flush(serving)
    publishes(serving, "stale", [0] * count)
    assert cached_tokens(serving) == [0] * count
    assert values(serving, "flushes_total") == [number + 1 for number in before]
    for at in values(serving, "flushed_timestamp_seconds"):
        assert flushed_at <= at <= time.time()

    reload(serving, checkpoints[0])  # With a flush, which is SGLang's default.
    publishes(serving, "flushes_total", [number + 2 for number in before])
    publishes(serving, "stale", [0] * count)
    assert cached_tokens(serving) == [0] * count


def test_a_reload_of_an_engine_that_has_cached_nothing_leaves_nothing(
    serving: Engine, checkpoints: tuple[Path, Path]
) -> None:
    flush(serving)
    reload(serving, checkpoints[1], flush_cache=False)
    publishes(serving, "stale", [0] * len(ranks(serving.scrape())))
    reload(serving, checkpoints[0])


def test_pauses_are_counted_as_what_they_are(engine: Engine) -> None:
    modes = ("in_place", "retract", "abort")
    never = [0.0] * len(ranks(engine.scrape()))
    before = {mode: values(engine, "pauses_total", mode=mode) or never for mode in modes}
    for mode in modes:
        status, answer = engine.post("/pause_generation", {"mode": mode})
        assert status == 200, answer
        # Where all are aborted SGLang's scheduler has nothing to pause.
        publishes(engine, "paused", [float(mode != "abort")] * len(ranks(engine.scrape())))
        status, answer = engine.post("/continue_generation", {})
        assert status == 200, answer
        publishes(engine, "paused", [0.0] * len(ranks(engine.scrape())))
    for mode in modes:
        publishes(engine, "pauses_total", [count + 1 for count in before[mode]], mode=mode)
