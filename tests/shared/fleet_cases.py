# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""How a model may be cut among all GPUs of a machine, and what is done to engines beside each
other: each a case of ``tests/gpu/test_fleet.py``, which is as wide as the machine."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from draft_plugin import write as write_draft_plugin
from engines import PREFIX, Scrape, http_get
from fleet_checks import (
    account_closes,
    equals_its_reference,
    fingerprints,
    hold_their_shares,
    load,
    milliseconds,
    nothing_failed,
    release_and_resume,
    reload,
    updates,
)
from fleet_engines import Figures, Fleet, FleetEngine, Place
from gpu_engines import SPECULATIVE
from ports import free_port
from waiting import LIMIT, eventually

SAVER = "--enable-memory-saver"
#: What SGLang has for experts on a CPU makes no token.
LOADS_ON_CPU = "--attention-backend torch_native"


def halves(fleet: Fleet) -> tuple[list[int], list[int]]:
    """GPUs of the first half of the machine, and of the second; none on a CPU."""
    every = list(range(len(fleet.gpus)))
    return every[: len(every) // 2], every[len(every) // 2 :]


def half(fleet: Fleet) -> int:
    return fleet.size // 2


def start_reference(fleet: Fleet, engine: FleetEngine, figures: Figures) -> Future[None]:
    return ThreadPoolExecutor(1).submit(fleet.make_reference, engine, figures)


def tensor_parallel(fleet: Fleet, figures: Figures) -> None:
    """A dense model cut among all GPUs, released and resumed in the rhythm of training."""
    size = fleet.size
    flags = f"--tp-size {size}" + f" {SAVER}" * fleet.on_gpus
    engine = fleet.engine("tensor_parallel", "dense-a", flags)
    beside = start_reference(fleet, engine, figures)
    fleet.start([engine], figures)
    model = fleet.models["dense-a"]
    hold_their_shares(engine, model.cut(tp=size), figures)
    figures.time("first tokens", engine.generate)
    reload(engine, "dense-b", figures)
    account_closes(engine, figures, "reloaded")
    figures.update(series_of(fleet, engine))
    if fleet.on_gpus:
        release_and_resume(engine, "dense-b", figures)
    beside.result()
    equals_its_reference(engine, figures)
    nothing_failed(engine)


def experts(fleet: Fleet, figures: Figures) -> None:
    """Experts divided among all GPUs, some of them twice, which EPLB moves under load."""
    size = fleet.size
    flags = f"--tp-size {size} --ep-size {size} "
    if fleet.on_gpus:
        flags += f"--enable-eplb --ep-num-redundant-experts {size}"
        flags += " --eplb-rebalance-num-iterations 40"
    else:
        flags += LOADS_ON_CPU
    engine = fleet.engine("experts", "experts-a", flags)
    beside = start_reference(fleet, engine, figures)
    fleet.start([engine], figures)
    redundant = size if fleet.on_gpus else 0
    cut = fleet.models["experts-a"].cut(tp=size, ep=size, redundant=redundant)
    hold_their_shares(engine, cut, figures)
    reload(engine, "experts-b", figures)
    beside.result()
    equals_its_reference(engine, figures)
    account_closes(engine, figures, "reloaded")
    if fleet.on_gpus:
        rebalance(engine, figures)
        hold_their_shares(engine, cut, figures)
        # Where the experts are now no reference can say.
        equals_its_reference(engine, figures, require="0")
    nothing_failed(engine)


def rebalance(engine: FleetEngine, figures: Figures) -> None:
    """Tokens until EPLB has moved experts; each rebalance is one update on every rank."""

    def moved() -> dict[Place, int]:
        figures.time("tokens before a rebalance", partial(engine.generate, 64))
        counted = updates(engine, "eplb")
        assert min(counted.values()) > 0, counted
        return counted

    eventually(moved)

    def agreed() -> set[int]:
        found = set(updates(engine, "eplb").values())
        assert len(found) == 1, found
        return found

    figures["rebalances"] = eventually(agreed)


def attention(fleet: Fleet, figures: Figures) -> None:
    """Attention whole on each GPU, experts cut among all."""
    size = fleet.size
    flags = f"--tp-size {size} --dp-size {size} --enable-dp-attention"
    engine = fleet.engine(
        "attention", "experts-a", flags if fleet.on_gpus else f"{flags} {LOADS_ON_CPU}"
    )
    beside = start_reference(fleet, engine, figures)
    fleet.start([engine], figures)
    cut = fleet.models["experts-a"].cut(tp=size, dp=size)
    hold_their_shares(engine, cut, figures)
    replicas = {rank.snapshot.ranks.dp for rank in engine.ranks()}
    assert replicas == set(range(size))
    if fleet.on_gpus:
        figures.time("first tokens", engine.generate)
    reload(engine, "experts-b", figures)
    account_closes(engine, figures, "reloaded")
    beside.result()
    equals_its_reference(engine, figures)
    nothing_failed(engine)


def pipeline(fleet: Fleet, figures: Figures) -> None:
    """Two stages, each cut among half of the GPUs."""
    tp = half(fleet)
    engine = fleet.engine("pipeline", "dense-a", f"--pp-size 2 --tp-size {tp}")
    beside = start_reference(fleet, engine, figures)
    fleet.start([engine], figures)
    hold_their_shares(engine, fleet.models["dense-a"].cut(pp=2, tp=tp), figures)
    figures.time("first tokens", engine.generate)
    reload(engine, "dense-b", figures)
    account_closes(engine, figures, "reloaded")
    beside.result()
    equals_its_reference(engine, figures)
    nothing_failed(engine)


def draft(fleet: Fleet, figures: Figures) -> None:
    """A draft beside its target, both cut among all GPUs. On a CPU it makes no token."""
    size, name = fleet.size, "eagle" if fleet.on_gpus else "draft"
    path, variables = fleet.checkpoint(name), {}
    flags = f"--tp-size {size} --speculative-draft-model-path {path} {SPECULATIVE} "
    if fleet.on_gpus:
        flags += "--speculative-algorithm EAGLE"
    else:
        flags += "--speculative-algorithm STANDALONE --speculative-draft-attention-backend triton"
        plugin = write_draft_plugin(fleet.directory / "plugin")
        variables["PYTHONPATH"] = f"{plugin}:{fleet.directory / 'site'}"
    engine = fleet.engine("draft", "dense-a", flags, variables=variables)
    beside = start_reference(fleet, engine, figures)
    fleet.start([engine], figures)
    hold_their_shares(engine, fleet.models["dense-a"].cut(tp=size), figures)
    cut = fleet.models[name].cut(tp=size)
    hold_their_shares(engine, cut, figures, role="draft", model=name)
    # Before updates: SGLang loads the draft from the target's checkpoint then.
    beside.result()
    equals_its_reference(engine, figures)
    if fleet.on_gpus:
        figures.time("first tokens", engine.generate)
    reload(engine, "dense-b", figures)
    account_closes(engine, figures, "reloaded")
    nothing_failed(engine)


def two_engines(fleet: Fleet, figures: Figures) -> None:
    """Replicas on half of the GPUs each, released in turn while the other makes tokens."""
    first, second = halves(fleet)
    flags = f"--tp-size {half(fleet)}" + f" {SAVER}" * fleet.on_gpus
    pair = [
        fleet.engine(
            name,
            "dense-a",
            f"{flags} --served-model-name replicas",
            gpus=gpus,
            isolated=name == "right",
        )
        for name, gpus in (("left", first), ("right", second))
    ]
    beside = start_reference(fleet, pair[0], figures)
    fleet.start(pair, figures)
    cut = fleet.models["dense-a"].cut(tp=half(fleet))
    for engine in pair:
        hold_their_shares(engine, cut, figures)
    assert fingerprints(pair[0]) == fingerprints(pair[1])
    for engine, other in (pair, pair[::-1]):
        if not fleet.on_gpus:
            reload(engine, "dense-b", figures)
            continue
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(generate_until, other, stop)
            try:
                release_and_resume(engine, "dense-b", figures, rounds=1)
            finally:
                stop.set()
            figures[f"requests of {other.name} meanwhile"] = busy.result()
    assert fingerprints(pair[0]) == fingerprints(pair[1])
    beside.result()
    for engine in pair:
        load(engine, engine.model)  # The account is as of the last capture.
        equals_its_reference(engine, figures)
        account_closes(engine, figures, engine.name)
        nothing_failed(engine)


def generate_until(engine: FleetEngine, stop: threading.Event) -> int:
    """How many requests were answered."""
    answered = 0
    while not stop.is_set():
        engine.generate()
        answered += 4
    return answered


def trainer(fleet: Fleet, figures: Figures) -> None:
    """A trainer on half of the GPUs sends what it has in shards to an engine on the others."""
    first, second = halves(fleet)
    sent = fleet.directory / "sent"
    sent.mkdir()
    tp = half(fleet) if fleet.on_gpus else 2
    variables = {PREFIX + "MANIFEST_DIR": str(sent)}
    flags = f"--tp-size {tp}"
    engine = fleet.engine("trained", "dense-a", flags, gpus=first, variables=variables)
    fleet.start([engine], figures)
    hold_their_shares(engine, fleet.models["dense-a"].cut(tp=tp), figures)
    if fleet.on_gpus:
        figures.time("first tokens", engine.generate)
    original, before = fingerprints(engine), updates(engine, "distributed")
    orders = [fleet.checkpoint(name) for name in ("dense-b", "dense-a", "dense-b", "dense-a")]
    said = run_trainer(fleet, engine, sent, orders, second or [None], tp)
    figures["bytes sent"] = said["bytes"]
    figures["seconds of updates"] = [round(each, 3) for each in said["seconds"]]
    expected = {place: number + len(orders) for place, number in before.items()}
    eventually(lambda: updates(engine, "distributed") == expected)
    assert fingerprints(engine) == original
    done = engine.engine.exporter_cli(
        "verify", "--engine", engine.label, "--manifest", str(sent), "--require", "1"
    )
    assert done.returncode == 0, done.stdout + done.stderr

    # Of an exporter whose first rank was told of manifests.
    matches = engine.series(fleet.scrape(), "sglang_weight_manifest_match")
    figures["ranks with a manifest"] = len(matches)
    assert {sample.value for sample in matches} <= {1.0}
    account_closes(engine, figures, "sent")
    nothing_failed(engine)


def run_trainer(
    fleet: Fleet,
    engine: FleetEngine,
    sent: Path,
    checkpoints: Sequence[Path],
    gpus: Sequence[int | None],
    ranks: int,
) -> dict[str, list[float]]:
    """What its first process has measured."""
    common = {
        "world": len(gpus),
        "url": engine.engine.url,
        "ranks": ranks,
        "own_port": free_port(),
        "engine_port": free_port(),
        "manifests": str(sent),
        "checkpoints": list(map(str, checkpoints)),
    }
    program = Path(__file__).with_name("fleet_trainer.py")
    processes = [
        subprocess.Popen(
            [
                *(str(fleet.python), str(program)),
                json.dumps({**common, "rank": rank, "device": device_of(fleet, gpu)}),
            ],
            env={**engine.engine.environment, "SGLANG_WEIGHT_EXPORTER_DISABLED": "1"},
            stdout=subprocess.PIPE,
            stderr=(fleet.directory / f"trained-{rank}.log").open("wb"),
            text=True,
        )
        for rank, gpu in enumerate(gpus)
    ]
    try:
        said, _ = processes[0].communicate(timeout=LIMIT)
    finally:
        for process in processes:
            process.kill()
    logs = "".join(
        path.read_text(errors="replace")[-3000:] for path in fleet.directory.glob("trained-*.log")
    )
    assert processes[0].returncode == 0, logs
    found: dict[str, list[float]] = json.loads(said.splitlines()[-1])
    return found


def device_of(fleet: Fleet, gpu: int | None) -> str:
    return "cpu" if gpu is None else f"cuda:{fleet.gpus[gpu].index}"


def disaggregation(fleet: Fleet, figures: Figures) -> None:
    """A prefill and a decode engine of one model, whose keys and values go over TCP."""
    first, second = halves(fleet)
    port = free_port()
    flags = f"--tp-size {half(fleet)} --disaggregation-transfer-backend mooncake_tcp"
    # SGLang 0.5.23 keeps decoded keys and values on the host, if it has 10 GiB to spare.
    flags += " --hicache-size 1" * (not fleet.on_gpus)
    flags += f" --disaggregation-bootstrap-port {port} --disaggregation-mode"
    address = {"SGLANG_HOST_IP": "127.0.0.1"}
    pair = [
        fleet.engine(mode, "dense-a", f"{flags} {mode}", gpus=gpus, variables=address)
        for mode, gpus in (("prefill", first), ("decode", second))
    ]
    fleet.start(pair, figures)
    cut = fleet.models["dense-a"].cut(tp=half(fleet))
    for engine in pair:
        hold_their_shares(engine, cut, figures)
    assert fingerprints(pair[0]) == fingerprints(pair[1])

    def ask() -> None:
        # What SGLang's router sends to both.
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port}
        room["bootstrap_room"] = random.randrange(2**31)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(pair[0].engine.post, "/generate", {**prompt(), **room})
            status, answer = pair[1].engine.post("/generate", {**prompt(), **room})
            assert (status, beside.result()[0]) == (200, 200), (answer, beside.result())
        assert answer["meta_info"]["completion_tokens"] == 16

    figures.time("first tokens", ask)
    for engine in pair:
        reload(engine, "dense-b", figures)
        account_closes(engine, figures, engine.name)
    figures.time("tokens after updates", ask)
    for engine in pair:
        nothing_failed(engine)


def prompt() -> dict[str, object]:
    parameters = {"max_new_tokens": 16, "temperature": 0, "ignore_eos": True}
    return {"input_ids": list(range(3, 43)), "sampling_params": parameters}


def exporter(fleet: Fleet, figures: Figures) -> None:
    """What the one exporter costs with the ranks of all engines that are alive, and how long a
    scrape takes beside generation."""
    process = fleet.exporter()
    ranks = len(fleet.scrape().series("sglang_weight_resident_bytes", role="target"))
    figures["ranks"] = ranks
    for preset in ("lean", "default", "full"):
        text = fleet.scrape(preset).text
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        figures[f"{preset}: series, bytes"] = f"{len(lines):,}, {len(text.encode()):,}"
    seconds = 10.0 if fleet.on_gpus else 3.0
    figures["scrape, idle"] = milliseconds(scrapes(fleet, seconds))
    stop, engine = threading.Event(), fleet.every["tensor_parallel"]
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(generate_until, engine, stop)
        before, began = sum(process.cpu_times()[:2]), time.monotonic()
        try:
            taken = scrapes(fleet, seconds)
        finally:
            stop.set()
        used, passed = sum(process.cpu_times()[:2]) - before, time.monotonic() - began
        figures["requests beside"] = busy.result()
    figures["scrape, beside generation"] = milliseconds(taken)
    figures["exporter: processor, share of a core"] = round(used / passed, 4)
    # A Prometheus asks once a second.
    figures["exporter: processor a scrape, ms"] = round(1e3 * used / (len(taken) + passed), 2)
    figures["exporter: resident memory, bytes"] = process.memory_info().rss


def scrapes(fleet: Fleet, seconds: float) -> list[float]:
    """Seconds of each, ten a second, beside those of a Prometheus."""
    taken, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        assert http_get(f"http://127.0.0.1:{fleet.exporter_port}/metrics")[0] == 200
        taken.append(time.perf_counter() - began)
        time.sleep(0.1)
    return taken


def series_of(fleet: Fleet, engine: FleetEngine) -> Figures:
    """How many series a GPU of a host with eight has by default: its rank's, its own and its part
    of the host's."""
    scrape: Scrape = fleet.scrape("default")
    own = {"engine": engine.label, "tp_rank": "0", "pp_rank": "0"}
    of_rank = [s for s in scrape.samples if own.items() <= s.labels.items()]
    marks = ("sglang_weight_fingerprint", "sglang_weight_tensors_altered")
    without = [s for s in of_rank if not s.name.startswith(marks)]
    of_gpu = [
        s
        for s in scrape.samples
        if s.labels.get("gpu") and s.labels["gpu_uuid"] == engine.gpus[0].uuid
    ]
    host = [s for s in scrape.samples if "engine" not in s.labels and not s.labels.get("gpu")]
    a_gpu = len(without) + len(of_gpu) + len(host) / 8
    if fleet.on_gpus:
        assert a_gpu <= 70, (len(without), len(of_gpu), len(host))
    names = {"a rank": len(of_rank), "a rank without fingerprints": len(without)}
    return Figures({**names, "of a GPU": len(of_gpu), "of the host": len(host), "a GPU": a_gpu})
