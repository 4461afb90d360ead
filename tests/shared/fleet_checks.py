# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What has to be true of an engine of the fleet, whatever it is cut into and whatever was done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import fleet_checkpoints
from fleet_checkpoints import Cut
from fleet_engines import Figures, Fleet, FleetEngine, Place
from gpu_engines import Gpu, Rank, storages
from waiting import eventually


def hold_their_shares(
    engine: FleetEngine, cut: Cut, figures: Figures, *, role: str = "target", model: str = ""
) -> None:
    """Bytes of parameters against the checkpoint's header, and each rank on its GPU."""
    tensors = fleet_checkpoints.header(engine.fleet.checkpoint(model or engine.model))
    scrape = engine.fleet.scrape()
    published = engine.by_rank(scrape, "sglang_weight_bytes", kind="parameter", role=role)
    places = [(stage, rank) for stage in range(cut.pp) for rank in range(cut.tp)]
    if role == "target":
        expected = {place: cut.share(tensors, place[0]) for place in places}
    else:
        expected = {place: cut.share(tensors) for place in places}
    named = {f"{role}: checkpoint's bytes": sum(tensors.values())}
    named |= {f"{role}: bytes of stage {stage}": expected[stage, 0] for stage in range(cut.pp)}
    figures.update(named)
    assert published == expected, f"{engine.name}: {published}, expected {expected}"
    for kind in ("buffer", "derived"):
        figures[f"{role}: {kind}"] = sum(
            sample.value
            for sample in engine.series(scrape, "sglang_weight_bytes", kind=kind, role=role)
        )
    if engine.fleet.on_gpus:
        for sample in engine.series(scrape, "sglang_weight_resident_bytes", role=role):
            place = int(sample.labels["pp_rank"]), int(sample.labels["tp_rank"])
            assert sample.labels["gpu_uuid"] == engine.gpu_of(place, cut.tp).uuid, place


def updates(engine: FleetEngine, source: str) -> dict[Place, int]:
    scrape = engine.fleet.scrape()
    return engine.by_rank(scrape, "sglang_weight_updates_total", source=source, role="target")


def fingerprints(engine: FleetEngine) -> dict[Place, float]:
    """Of all target ranks; without those whose weights are released."""
    samples = engine.series(engine.fleet.scrape(), "sglang_weight_fingerprint", role="target")
    return {(int(s.labels["pp_rank"]), int(s.labels["tp_rank"])): s.value for s in samples}


def one_update_each(
    engine: FleetEngine, act: Callable[[], None], source: str, figures: Figures
) -> None:
    """What is done is one update on every rank, in place, under one trace."""
    before, moved = updates(engine, source), moves(engine)
    figures.time(f"update from {source}", act)
    expected = {place: number + 1 for place, number in before.items()}
    # Rank 0 answers for all of them, and others may still write what they count.
    eventually(lambda: updates(engine, source) == expected, what=f"{expected} on {engine.name}")
    assert moves(engine) == moved, f"{engine.name}: {moves(engine)}, before {moved}"
    traces = {rank.role().last_update.trace_id for rank in engine.ranks()}
    assert len(traces) == 1, traces


def moves(engine: FleetEngine) -> dict[Place, int]:
    return engine.by_rank(engine.fleet.scrape(), "sglang_weight_tensors_moved_total")


def load(engine: FleetEngine, checkpoint: str) -> None:
    path = engine.fleet.checkpoint(checkpoint)
    engine.engine.put_requests_away()
    status, answer = engine.engine.update_weights_from_disk(path)
    assert (status, answer["success"]) == (200, True), answer


def reload(engine: FleetEngine, other: str, figures: Figures) -> None:
    """Another checkpoint and back: every rank's fingerprint changes, and is the first one again."""
    first = fingerprints(engine)
    one_update_each(engine, partial(load, engine, other), "disk", figures)
    second = fingerprints(engine)
    assert first.keys() == second.keys()
    assert all(first[place] != second[place] for place in first), (first, second)
    one_update_each(engine, partial(load, engine, engine.model), "disk", figures)
    assert fingerprints(engine) == first, f"{fingerprints(engine)}, first {first}"


def equals_its_reference(engine: FleetEngine, figures: Figures, *, require: str = "1") -> None:
    """What each rank holds now, against what SGLang's own loader made in another engine."""
    compared = ("verify", "--engine", engine.label, "--manifest", str(engine.fleet.references))
    done = engine.engine.exporter_cli(*compared, "--require", require)
    figures["verify"] = [line for line in done.stdout.splitlines() if " different" in line]
    assert done.returncode == 0, done.stdout + done.stderr
    for line in figures["verify"]:
        assert " 0 different" in line, done.stdout


def account_closes(engine: FleetEngine, figures: Figures, moment: str) -> None:
    """Every byte of each GPU, against torch's allocator in the rank and against NVML."""
    if not engine.fleet.on_gpus:
        return
    for number, rank in enumerate(engine.ranks()):
        found = eventually(partial(_account_of_rank, engine, rank))
        for name, value in found.items():
            figures[f"{moment}, rank {number}: {name}"] = value
    for gpu in engine.gpus:
        found = eventually(partial(_account_of_gpu, engine.fleet, gpu))
        for name, value in found.items():
            figures[f"{moment}, GPU {gpu.index}: {name}"] = value


def _account_of_rank(engine: FleetEngine, rank: Rank) -> dict[str, int]:
    memory, ranks, scrape = rank.ask("memory"), rank.snapshot.ranks, engine.fleet.scrape()
    labels = {"tp_rank": str(ranks.tp), "pp_rank": str(ranks.pp)}

    def total(name: str) -> int:
        samples = engine.series(scrape, f"sglang_rank_memory_{name}", **labels)
        assert samples, f"no {name} of {engine.name} {ranks}"
        return int(sum(sample.value for sample in samples))

    parts = {
        sample.labels["part"]: int(sample.value)
        for sample in engine.series(scrape, "sglang_rank_memory_bytes", **labels)
    }
    released = total("released_bytes")
    apart = {
        "reserved_bytes": (total("reserved_bytes"), memory["reserved"]),
        "allocated_bytes": (total("allocated_bytes"), memory["allocated"]),
        "sum of parts": (sum(parts.values()), memory["reserved"] - released),
        "process_bytes": (total("process_bytes"), memory["processes"][rank.snapshot.pid]),
    }
    differing = {name: pair for name, pair in apart.items() if pair[0] != pair[1]}
    assert not differing, f"{engine.name} {ranks}: {differing}"
    if not released:
        held: dict[int, int] = {}
        for role in rank.snapshot.roles:
            held |= storages(rank.table(role.name))
        assert parts["weights"] == sum(held.values()), (parts, sum(held.values()))
    outside = total("outside_torch_bytes")
    return {**parts, "released": released, "outside torch": outside}


def _account_of_gpu(fleet: Fleet, gpu: Gpu) -> dict[str, int]:
    scrape = fleet.scrape()
    series = scrape.series("sglang_gpu_memory_bytes", gpu_uuid=gpu.uuid)
    parts = {sample.labels["part"]: int(sample.value) for sample in series}
    total = scrape.one("sglang_gpu_memory_total_bytes", gpu_uuid=gpu.uuid)
    assert sum(parts.values()) == total, f"GPU {gpu.index}: {parts} of {total}"
    return parts


def release_and_resume(engine: FleetEngine, other: str, figures: Figures, rounds: int = 2) -> None:
    """In the rhythm of training: everything is released; weights come back, are sent, and the KV
    pool comes back."""
    post, first = engine.engine.post, fingerprints(engine)
    for round_ in range(rounds):
        taken = {rank.snapshot.pid: rank.ask("memory")["processes"] for rank in engine.ranks()}
        engine.engine.put_requests_away()
        assert post("/release_memory_occupation", {})[0] == 200
        eventually(partial(_released, engine))
        account_closes(engine, figures, f"released, round {round_}")
        for rank in engine.ranks():
            pid = rank.snapshot.pid
            given = taken[pid][pid] - rank.ask("memory")["processes"][pid]
            figures[f"NVML: given back by rank {rank.snapshot.ranks}"] = given
        assert post("/resume_memory_occupation", {"tags": ["weights"]})[0] == 200
        one_update_each(engine, partial(load, engine, other), "disk", figures)
        assert post("/resume_memory_occupation", {"tags": ["kv_cache"]})[0] == 200
        assert all(fingerprints(engine)[place] != first[place] for place in first)
        engine.generate()
        one_update_each(engine, partial(load, engine, engine.model), "disk", figures)
        assert fingerprints(engine) == first, f"{fingerprints(engine)}, first {first}"
        account_closes(engine, figures, f"resumed, round {round_}")


def _released(engine: FleetEngine) -> bool:
    """Whether every rank has given back all but a twentieth."""
    scrape = engine.fleet.scrape()
    held = engine.by_rank(scrape, "sglang_weight_bytes", role="target")
    left = engine.by_rank(scrape, "sglang_weight_resident_bytes", role="target")
    pools = engine.by_rank(scrape, "sglang_kv_pool_bytes", role="target")
    kept = engine.by_rank(scrape, "sglang_kv_pool_resident_bytes", role="target")
    return all(left[place] < 0.05 * held[place] for place in held) and all(
        kept[place] < 0.05 * pools[place] for place in pools
    )


def nothing_failed(engine: FleetEngine) -> None:
    scrape = engine.fleet.scrape()
    errors = scrape.series("sglang_weight_exporter_hook_errors_total", engine=engine.label)
    assert not [sample for sample in errors if sample.value], errors
    hooks = engine.series(scrape, "sglang_weight_exporter_hooks", state="failed")
    assert not [sample for sample in hooks if sample.value], hooks


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and longest."""
    return f"{1e3 * statistics.median(seconds):.1f}, at most {1e3 * max(seconds):.1f} ms"
