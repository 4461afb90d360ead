# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine of two tensor-parallel ranks: each publishes, and is verified as, its own half.

On the CPU, over gloo. All is SGLang's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_model
from engine_pool import KINDS
from engines import Engine, Scrape
from waiting import eventually

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

RANKS = ("0", "1")


def verify(engine: Engine, checkpoint: Path) -> tuple[int, str]:
    done = engine.exporter_cli("verify", "--checkpoint", str(checkpoint))
    return done.returncode, done.stdout + done.stderr


def reload(engine: Engine, checkpoint: Path) -> list[float]:
    """The fingerprint of each rank after it."""

    def updates(scrape: Scrape) -> list[float]:
        name, source = "sglang_weight_updates_total", "disk"
        return [scrape.one(name, tp_rank=rank, source=source) for rank in RANKS]

    before = updates(engine.scrape())
    status, answer = engine.update_weights_from_disk(checkpoint)
    assert (status, answer["success"]) == (200, True), answer

    def counted() -> Scrape:
        scrape = engine.scrape()
        assert updates(scrape) == [number + 1 for number in before]
        return scrape

    scrape = eventually(counted)
    return [scrape.one("sglang_weight_fingerprint", tp_rank=rank) for rank in RANKS]


def test_each_rank_publishes_its_half(
    tensor_parallel_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    header = tiny_model.safetensors_header(checkpoints[0])
    # Norms are on both, everything else is split.
    half = sum(size if "norm" in name else size // 2 for name, (_, size) in header.items())
    scrape = tensor_parallel_engine.scrape()
    for rank in RANKS:
        assert scrape.sum("sglang_weight_bytes", kind="parameter", tp_rank=rank) == half
    infos = [sample.labels for sample in scrape.series("sglang_weight_info")]
    engines = scrape.series("sglang_weight_engine_info")
    assert len({sample.labels["engine_group"] for sample in engines}) == 1
    assert [info["tp_size"] for info in infos] == ["2", "2"]


def test_each_rank_holds_its_share_of_the_checkpoint(
    tensor_parallel_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    reload(tensor_parallel_engine, checkpoints[0])
    status, text = verify(tensor_parallel_engine, checkpoints[0])
    assert status == 0, text
    assert text.count(" 0 different") == len(RANKS), text
    # The zoo has confirmed what this release makes of Llama's shares on a CPU.
    status, text = verify(tensor_parallel_engine, checkpoints[1])
    assert (status, text.count(" 10 different")) == (1, len(RANKS)), text
    assert text.count("different  lm_head.weight") == len(RANKS), text


def test_reloads_of_the_same_and_of_another_checkpoint(
    tensor_parallel_engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    first = reload(tensor_parallel_engine, checkpoints[0])
    assert reload(tensor_parallel_engine, checkpoints[0]) == first
    other = reload(tensor_parallel_engine, checkpoints[1])
    assert all(new != old for new, old in zip(other, first, strict=True))
    assert verify(tensor_parallel_engine, checkpoints[1])[0] == 0
    assert reload(tensor_parallel_engine, checkpoints[0]) == first
    assert verify(tensor_parallel_engine, checkpoints[0])[0] == 0


def test_a_reference_that_sglangs_own_loader_made(
    tensor_parallel_engine: Engine, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of both ranks. The two checkpoints have the same headers, so the other one is different from
    it, which no rule of ours says."""
    engine = tensor_parallel_engine
    command = ["reference", "--model-path", str(checkpoints[0]), "-o", str(tmp_path)]
    flags = [*KINDS["tensor_parallel_engine"].flags, *engine.installation.server_flags()]
    done = engine.exporter_cli(*command, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(RANKS), done.stdout
    reload(engine, checkpoints[0])

    def compared() -> tuple[int, str]:
        done = engine.exporter_cli("verify", "--manifest", str(tmp_path), "--require", "1")
        return done.returncode, done.stdout + done.stderr

    status, text = compared()
    assert status == 0, text
    assert text.count(" 0 different, 0 that cannot be compared") == len(RANKS), text
    reload(engine, checkpoints[1])
    status, text = compared()
    assert status == 1, text
    assert "different  model.layers.1.self_attn.qkv_proj.weight" in text
