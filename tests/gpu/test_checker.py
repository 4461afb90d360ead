# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's own checker, which compares on a GPU alone, through the command."""

from __future__ import annotations

from gpu_engines import GpuEngine, GpuEngines


def checked(engine: GpuEngine, action: str) -> tuple[int, str]:
    done = engine.engine.exporter_cli("verify", "--through-checker", action)
    return done.returncode, done.stdout + done.stderr


def test_a_copy_is_kept_and_compared(
    fingerprint_engine: GpuEngine, gpu_engines: GpuEngines
) -> None:
    checkpoints = gpu_engines.checkpoints
    for name, expected, said in (
        ("a", 0, "equal to the copy that it kept"),
        ("b", 1, "different  model.layers.0.self_attn.qkv_proj.weight"),
    ):
        engine = fingerprint_engine.engine
        assert engine.update_weights_from_disk(checkpoints["a"])[0] == 200
        status, text = checked(fingerprint_engine, "snapshot")
        assert (status, "keeps a copy" in text) == (0, True), text
        assert engine.update_weights_from_disk(checkpoints[name])[0] == 200
        status, text = checked(fingerprint_engine, "compare")
        assert (status, said in text) == (expected, True), text
