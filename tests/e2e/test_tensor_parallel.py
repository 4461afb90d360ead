# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine of two tensor-parallel ranks: each publishes, and is verified as, its own half.

On the CPU, over gloo. All is SGLang's own: torch for CUDA brings an NCCL, which wants a GPU, and
``SGLANG_NCCL_SO_PATH`` says where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
from engines import Engine, Installation, Scrape, eventually

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

RANKS = ("0", "1")


@pytest.fixture(scope="module")
def engine(newest: Installation, checkpoints: tuple[Path, Path]) -> Iterator[Engine]:
    engine = Engine(
        newest,
        checkpoints[0],
        flags=["--tp-size", "2", "--disable-custom-all-reduce"],
        variables={
            "SGLANG_NCCL_SO_PATH": "none",
            "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
            "GLOO_SOCKET_IFNAME": "lo",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            "SGLANG_WEIGHT_EXPORTER_FINGERPRINT": "on",
        },
    )
    try:
        engine.start()
        yield engine.wait_until_ready()
    finally:
        engine.stop()


def verify(engine: Engine, checkpoint: Path) -> tuple[int, str]:
    done = engine.exporter_cli("verify", "--checkpoint", str(checkpoint))
    return done.returncode, done.stdout + done.stderr


def reload(engine: Engine, checkpoint: Path, number: int) -> list[float]:
    """The n-th reload: the fingerprint of each rank."""
    status, answer = engine.update_weights_from_disk(checkpoint)
    assert (status, answer["success"]) == (200, True), answer

    def counted() -> Scrape:
        scrape = engine.scrape()
        for rank in RANKS:
            assert scrape.one("sglang_weight_updates_total", tp_rank=rank, source="disk") == number
        return scrape

    scrape = eventually(counted)
    return [scrape.one("sglang_weight_fingerprint", tp_rank=rank) for rank in RANKS]


def test_each_rank_publishes_its_half(engine: Engine, checkpoints: tuple[Path, Path]) -> None:
    header = tiny_model.safetensors_header(checkpoints[0])
    # Norms are on both, everything else is split.
    half = sum(size if "norm" in name else size // 2 for name, (_, size) in header.items())
    scrape = engine.scrape()
    for rank in RANKS:
        assert scrape.sum("sglang_weight_bytes", kind="parameter", tp_rank=rank) == half
    infos = [sample.labels for sample in scrape.series("sglang_weight_info")]
    assert len({info["engine_group"] for info in infos}) == 1
    assert [info["tp_size"] for info in infos] == ["2", "2"]


def test_each_rank_holds_its_share_of_the_checkpoint(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    status, text = verify(engine, checkpoints[0])
    assert status == 0, text
    assert text.count(" 0 different") == len(RANKS), text
    status, text = verify(engine, checkpoints[1])
    assert status == 1, text


def test_reloads_of_the_same_and_of_another_checkpoint(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    first = reload(engine, checkpoints[0], 1)
    assert reload(engine, checkpoints[0], 2) == first
    other = reload(engine, checkpoints[1], 3)
    assert all(new != old for new, old in zip(other, first, strict=True))
    assert verify(engine, checkpoints[1])[0] == 0
    assert reload(engine, checkpoints[0], 4) == first
    assert verify(engine, checkpoints[0])[0] == 0
