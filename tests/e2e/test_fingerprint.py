# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real engine of two replicas, from the bytes in its memory to what ``verify`` says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_model
from engines import Engine, Scrape
from waiting import eventually

pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

from sglang_weight_exporter import fingerprint

RANKS = ("0", "1")
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def stored(checkpoint: Path, name: str) -> bytes:
    """A tensor's bytes, by the header that wrote them."""
    content = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return content[8 + length + start : 8 + length + stop]


def numbers(scrape: Scrape) -> list[float]:
    return [scrape.one("sglang_weight_fingerprint", dp_rank=rank) for rank in RANKS]


def updates(scrape: Scrape) -> list[float]:
    return [
        scrape.one("sglang_weight_updates_total", dp_rank=rank, source="disk") for rank in RANKS
    ]


def reload(engine: Engine, checkpoint: Path) -> Scrape:
    before = updates(engine.scrape())
    assert engine.update_weights_from_disk(checkpoint)[0] == 200

    def counted() -> Scrape:
        scrape = engine.scrape()
        assert updates(scrape) == [count + 1 for count in before]
        return scrape

    return eventually(counted)


@pytest.fixture(autouse=True)
def _first(engine: Engine, checkpoints: tuple[Path, Path]) -> None:
    """Whatever other tests of this engine have left there."""
    reload(engine, checkpoints[0])


def verify(engine: Engine, *arguments: str) -> tuple[int, str]:
    done = engine.exporter_cli("verify", *arguments)
    return done.returncode, done.stdout + done.stderr


def test_what_is_served_is_what_the_checkpoint_holds(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    done = engine.exporter_cli("table", "--fingerprints", "--rank", "dp=0")
    assert done.returncode == 0, done.stderr
    pairs = (line.split(" ") for line in done.stdout.splitlines()[1:])
    lines = {name: text for text, name in pairs}
    # What SGLang computes from the length of the context is no weight.
    computed = {name for name, text in lines.items() if set(text) == {"-"}}
    assert computed
    assert all(name.endswith("cos_sin_cache") for name in computed)
    for name in computed:
        del lines[name]
    norm = "model.layers.0.input_layernorm.weight"
    parts = [QKV.replace("qkv", part) for part in "qkv"]
    fused = b"".join(stored(checkpoints[0], name) for name in parts)
    assert lines[norm] == fingerprint.of_bytes(stored(checkpoints[0], norm))
    assert lines[QKV] == fingerprint.of_bytes(fused)
    one, other = numbers(engine.scrape())
    assert one == other == fingerprint.as_number(fingerprint.of_rank(lines))


def test_verify_against_checkpoints_manifests_and_replicas(
    engine: Engine, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    status, text = verify(engine, "--checkpoint", str(checkpoints[0]))
    assert status == 0, text
    # Per layer: two norms, qkv_proj, o_proj, gate_up_proj, down_proj; embeddings, norm, lm_head.
    assert text.count(f"{6 * tiny_model.LAYERS + 3} equal, 0 different") == len(RANKS), text
    status, text = verify(engine, "--checkpoint", str(checkpoints[1]))
    assert status == 1, text
    assert f"different  {QKV}" in text
    assert verify(engine)[0] == 0
    manifest = tmp_path / "manifest.json"
    done = engine.exporter_cli("manifest", str(checkpoints[0]), "-o", str(manifest))
    assert done.returncode == 0, done.stderr
    assert verify(engine, "--manifest", str(manifest))[0] == 2  # Less than half of the bytes.
    few = ["--manifest", str(manifest), "--require", "0.3"]
    status, text = verify(engine, *few)
    assert status == 0, text
    # What is not fused: per layer two norms, o_proj and down_proj; embeddings, norm and lm_head.
    assert text.count(f"{4 * tiny_model.LAYERS + 3} equal, 0 different") == len(RANKS), text
    whole = tmp_path / "fused.json"
    done = engine.exporter_cli("manifest", "--fused", str(checkpoints[0]), "-o", str(whole))
    assert done.returncode == 0, done.stderr
    status, text = verify(engine, "--manifest", str(whole))
    assert status == 0, text
    assert text.count(f"{6 * tiny_model.LAYERS + 3} equal, 0 different") == len(RANKS), text
    content = json.loads(manifest.read_text())
    norm = content["tensors"]["model.norm.weight"]
    norm["fingerprint"] = norm["fingerprint"][::-1]
    manifest.write_text(json.dumps(content))
    status, text = verify(engine, "--manifest", str(manifest))
    assert status == 1
    assert text.count("different  ") == text.count("different  model.norm.weight") == len(RANKS)
    norm["shape"] = [1, 2]  # As if the engine held a share of it.
    manifest.write_text(json.dumps(content))
    assert verify(engine, *few)[0] == 0
    manifest.write_text(json.dumps({**content, "tensors": {"x": norm}}))
    assert verify(engine, "--manifest", str(manifest))[0] == 2


def test_a_reload_of_the_same_and_of_another_checkpoint(
    engine: Engine, checkpoints: tuple[Path, Path]
) -> None:
    before = numbers(engine.scrape())
    assert numbers(reload(engine, checkpoints[0])) == before
    after = reload(engine, checkpoints[1])
    assert len({*before, *numbers(after)}) == 2
    assert verify(engine, "--checkpoint", str(checkpoints[1]))[0] == 0
    assert verify(engine, "--checkpoint", str(checkpoints[0]))[0] == 1
    for rank in RANKS:
        assert after.one("sglang_weight_fingerprint_seconds", dp_rank=rank) > 0
    assert numbers(reload(engine, checkpoints[0])) == before


def test_a_bit_that_flipped_in_memory_is_found_by_name(engine: Engine) -> None:
    """In one replica's own memory, past SGLang and torch."""
    done = engine.exporter_cli("table", "--rank", "dp=1", "--format", "json")
    (table,) = json.loads(done.stdout)["tables"]
    (address,) = [int(row["data_ptr"], 16) for row in table["tensors"] if row["name"] == QKV]
    before = numbers(engine.scrape())
    with Path(f"/proc/{table['pid']}/mem").open("r+b", buffering=0) as memory:

        def flip() -> None:
            value = os.pread(memory.fileno(), 1, address + 4321)[0]
            assert os.pwrite(memory.fileno(), bytes([value ^ 0x10]), address + 4321) == 1

        flip()
        try:
            assert verify(engine, "--recorded", "--checkpoint", str(engine.model))[0] == 0
            status, text = verify(engine, "--url", "http://127.0.0.1:9")
            assert status == 2  # Nothing was captured.
            assert "could not be asked to capture its weights again" in text
            assert text.count("not captured again") == len(RANKS)
            status, text = verify(engine)
            assert status == 1, text
            assert "captured again" not in text
            assert [line.split()[1] for line in text.splitlines() if "different  " in line] == [QKV]
            after = numbers(eventually(lambda: engine.scrape()))
            assert (after[0], after[1] != before[1]) == (before[0], True)
        finally:
            flip()
    assert verify(engine)[0] == 0
    assert "sglang_weight_exporter_part" not in engine.log()  # SGLang has refused it each time.
