# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What an update costs those who wait, in a real engine under load.

A client that streams its answers says what is right: how many of them were aborted and how many
went on, which go on under a new version, and between which of its own times no token can have come.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import Engine
from waiting import LIMIT, eventually

REQUESTS = 4
#: Nearly all that the model has room for: requests are still there when an update begins.
TOKENS = 480


class Client(threading.Thread):
    """One request, whose answer is streamed: when each piece came, and what the last one says."""

    def __init__(self, engine: Engine, tokens: int = TOKENS) -> None:
        super().__init__(daemon=True)
        self.engine = engine
        self.tokens = tokens
        self.times: list[float] = []
        self.meta: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        body = {
            "input_ids": [5, 6, 7],
            "sampling_params": {"max_new_tokens": self.tokens, "ignore_eos": True},
            "stream": True,
        }
        request = urllib.request.Request(
            self.engine.url + "/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    self.times.append(time.time())
                    self.meta = json.loads(line[6:])["meta_info"]

    @property
    def aborted(self) -> bool:
        return bool(self.meta["finish_reason"]["type"] == "abort")

    @property
    def straddles(self) -> bool:
        return len(self.meta["weight_versions"]) > 1


def all_have_tokens(found: Sequence[Client]) -> bool:
    return all(len(client.times) > 2 for client in found)


def clients(engine: Engine) -> list[Client]:
    """Requests that have tokens, and are not through: the first of an engine may wait for seconds
    until one of them is let in, while another is answered."""
    while True:
        found = [Client(engine) for _ in range(REQUESTS)]
        eventually(partial(all_have_tokens, found), what="tokens of all")
        if not any(client.meta["finish_reason"] for client in found):
            return found
        for client in found:
            client.join(LIMIT)


def total(engine: Engine, name: str, **labels: str) -> float:
    """Of both data-parallel ranks."""
    series = engine.scrape().series(f"sglang_weight_update_{name}_total", source="disk", **labels)
    return sum(sample.value for sample in series)


def post(engine: Engine, path: str, body: dict[str, Any]) -> Any:
    status, answer = engine.post(path, body)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize(
    ("mode", "fate"), [("in_place", "kept"), ("retract", "retracted"), ("abort", "aborted")]
)
def test_an_update_under_load_costs_what_its_clients_saw(
    engine: Engine, checkpoints: tuple[Path, Path], mode: str, fate: str
) -> None:
    fates = ("kept", "retracted", "aborted")
    names = ("requests", "straddling_requests", "paused_seconds", "discarded_tokens")
    before = {name: total(engine, name) for name in names}
    fates_before = {each: total(engine, "requests", fate=each) for each in fates}
    running = clients(engine)

    asked_at = time.time()
    post(engine, "/pause_generation", {"mode": mode})
    late = [Client(engine, tokens=3) for _ in range(2)]  # One a rank.
    body = {"model_path": str(checkpoints[1]), "weight_version": f"under load, {mode}"}
    assert post(engine, "/update_weights_from_disk", {**body, "flush_cache": False})["success"]
    updated_at = time.time()
    time.sleep(1)  # A trainer takes its time; the client sees no token in it.
    continued_at = time.time()
    post(engine, "/continue_generation", {})
    for client in (*running, *late):
        client.join(LIMIT)
        assert client.meta["finish_reason"] is not None

    aborted = [client for client in running if client.aborted]
    assert len(aborted) == (REQUESTS if mode == "abort" else 0)
    going_on = late if mode == "abort" else running
    assert not any(client.aborted for client in late)
    eventually(
        lambda: total(engine, "requests", fate=fate) - fates_before[fate] == REQUESTS,
        what=f"{REQUESTS} requests {fate}",
    )
    assert total(engine, "requests") - before["requests"] == REQUESTS  # The late ones are none.
    straddling = sum(client.straddles for client in running)
    assert total(engine, "straddling_requests") - before["straddling_requests"] == straddling
    assert straddling == (0 if mode == "abort" else REQUESTS)

    # Ranks were held from the update's answer to the order to go on, and not longer than from the
    # order to pause until all had made tokens again.
    ranks = len(engine.scrape().series("sglang_kv_cache_paused"))
    spent = total(engine, "paused_seconds") - before["paused_seconds"]
    again = [next(at for at in client.times if at > continued_at) for client in going_on]
    assert (continued_at - updated_at) * ranks <= spent <= (max(again) - asked_at) * ranks
    generated = total(engine, "discarded_tokens", kind="generated")
    if mode == "abort":
        made = sum(client.meta["completion_tokens"] for client in aborted)
        # Each has one or two more passes in flight when it is aborted.
        assert made - 3 * REQUESTS <= generated <= made
    else:
        assert generated == 0
    status = subprocess.run(
        [str(engine.installation.python), "-m", "sglang_weight_exporter", "status"],
        env=engine.environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert f"{fate}" in next(line for line in status.splitlines() if line.startswith("  cost"))
    post(engine, "/update_weights_from_disk", {"model_path": str(checkpoints[0])})
