# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``verify --through-checker``: what SGLang's ``/weights_checker`` answers, in words and statuses.

The answers have the form of SGLang 0.5.23's; a real engine's are in ``tests/gpu``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

from array_ranks import command
from http_servers import Handler, LocalServer
from published import PublishedRank

UP = "model.layers.1.mlp.gate_up_proj.weight"
FAILED = (
    "check tensor equality failed:\n"
    f"name={UP} max_abs_err=0.5 mean_abs_err=0.1 num_exceed=3 expect=x actual=y "
)


@contextlib.contextmanager
def engine(run: Path, name: str, answer: dict[str, Any], status: int = 200) -> Iterator[list[Any]]:
    """One that serves this; what it was asked."""
    asked: list[Any] = []

    class Engine(Handler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.read_body())))
            self.reply(json.dumps(answer).encode(), status)

    rank = PublishedRank(run, engine=name)
    with LocalServer(Engine) as server:
        rank.engine = msgspec.structs.replace(rank.engine, url=server.url)
        rank.publish()
        yield asked


def checksums(*each: dict[str, str]) -> dict[str, Any]:
    """Of the tensor-parallel ranks of an engine."""
    place = {"role": "target", "tp_size": len(each), "dp_rank": 0, "dp_size": 1, "size": len(each)}
    ranks = [
        {
            "checksums": held,
            "per_gpu_checksum": "",
            "parallelism_info": {**place, "tp_rank": tp, "pp_rank": 0, "pp_size": 1, "rank": tp},
        }
        for tp, held in enumerate(each)
    ]
    return {"success": True, "message": "Success.", "ranks": ranks}


def verify(run: Path, *words: str) -> tuple[int, str]:
    return command("verify", "--runtime-dir", run, "--through-checker", *words)


def test_replicas_are_compared_by_what_their_weights_stand_for(tmp_path: Path) -> None:
    one, other = {UP: "a", "norm": "b"}, {UP: "c", "norm": "b"}
    with engine(tmp_path, "1", checksums(one, one)), engine(tmp_path, "2", checksums(one, other)):
        status, text = verify(tmp_path)
    assert status == 1, text
    assert "engine 2  tp 0 pp 0  target\n  beside engine 1: 2 tensors stand for the same" in text
    assert f"1 tensors stand for the same values, 1 do not\n  different  {UP}\n" in text


def test_one_engine_alone_has_no_replica(tmp_path: Path) -> None:
    with engine(tmp_path, "1", checksums({UP: "a"})) as asked:
        status, text = verify(tmp_path)
    assert status == 2
    assert "no two ranks" in text
    assert asked == [("/weights_checker", {"action": "checksum"})]


def test_a_copy_is_kept_and_compared(tmp_path: Path) -> None:
    with engine(tmp_path, "1", {"success": True, "message": "Success."}) as asked:
        kept, first = verify(tmp_path, "snapshot")
        status, text = verify(tmp_path, "compare")
    assert (kept, status) == (0, 0), first + text
    assert "keeps a copy" in first
    assert "within SGLang's tolerance" in text
    assert [body for _, body in asked] == [
        {"action": "snapshot"},
        {"action": "compare", "allow_quant_error": True},
    ]


@pytest.mark.parametrize(
    ("message", "expected", "said"),
    [
        (FAILED, 1, f"different  {UP}, by 0.5 at most"),
        ("", 2, "--through-checker snapshot takes one"),
        ("Unsupported action='compare'", 2, "cannot be compared: Unsupported action='compare'"),
    ],
)
def test_what_the_checker_refuses(tmp_path: Path, message: str, expected: int, said: str) -> None:
    with engine(tmp_path, "1", {"success": False, "message": message}, 400):
        status, text = verify(tmp_path, "compare")
    assert (status, said in text) == (expected, True), text
