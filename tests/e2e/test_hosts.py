# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One real engine on two hosts, a pipeline stage on each, and a real Prometheus that scrapes both.

The hosts are network namespaces of this machine on one bridge, each with a disk of its own under
the checkpoints' path. The ranks talk over gloo. All is SGLang's own: torch for CUDA brings an NCCL,
which wants a GPU, and ``SGLANG_NCCL_SO_PATH`` says where there is none.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from collectors import Backend, attributes_of
from engines import Engine, Installation
from monitoring import Monitoring, run
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from ports import free_port
from waiting import eventually

pytestmark = pytest.mark.release("hosts")

MODEL = "two-hosts"
BRIDGE, BRIDGE_ADDRESS = "swe-bridge", "10.77.0.254"
EXPORTER_PORT, MEETING_PORT = 9400, 5000


@dataclass(frozen=True)
class Host:
    """A network namespace, and what is on its disk."""

    number: int
    disk: Path

    @property
    def namespace(self) -> str:
        return f"swe-host-{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def cable(self) -> str:
        """The bridge's end of it."""
        return f"swe-cable-{self.number}"

    def within(self, checkpoints: Path) -> list[str]:
        """Executes a command on this host. `ip netns exec` makes a namespace of mounts too."""
        mount = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "sh", "-c", mount, "sh"]
        return [*enter, str(self.disk), str(checkpoints)]

    def write(self, name: str, seed: int) -> None:
        """Put a checkpoint on this host's disk."""
        tiny_model.write(self.disk / name, seed)


def connect(hosts: list[Host]) -> None:
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for host in hosts:
        name = host.namespace
        run("ip", "netns", "add", name)
        ends = ("type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "add", host.cable, *ends)
        run("ip", "link", "set", host.cable, "master", BRIDGE, "up")
        run("ip", "-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            run("ip", "-n", name, "link", "set", device, "up")


def disconnect(hosts: list[Host]) -> None:
    """Also after a run that was killed before it could, whose processes keep its cables."""
    for host in hosts:
        subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
        subprocess.run(["ip", "link", "delete", host.cable], capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and `ip` (Debian's iproute2), to make two network namespaces")
    with (
        Path(tempfile.gettempdir(), f"{BRIDGE}.lock").open("w") as lock,
        tempfile.TemporaryDirectory(prefix="hosts-") as directory,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)  # The names are the machine's: one run at a time.
        made = [Host(number, Path(directory, f"disk-{number}")) for number in range(2)]
        for host in made:
            host.write("a", 0)
        disconnect(made)
        try:
            try:
                connect(made)
            except AssertionError as error:
                refusals = ("not permitted", "not supported", "Unknown device type")
                if not any(refusal in str(error) for refusal in refusals):
                    raise
                pytest.skip(f"needs a machine where root may connect network namespaces: {error}")
            yield made
        finally:
            disconnect(made)


@pytest.fixture(scope="module")
def checkpoints() -> Iterator[Path]:
    """Where each host has its own disk."""
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def backend(hosts: list[Host]) -> Iterator[Backend]:
    """Takes the spans of both hosts."""
    taking = Backend(address=BRIDGE_ADDRESS).start()
    yield taking
    taking.stop()


@pytest.fixture(scope="module")
def parts(
    newest: Installation, hosts: list[Host], checkpoints: Path, backend: Backend
) -> Iterator[list[Engine]]:
    """Of one engine, in order of the hosts. The first serves requests."""
    port = free_port(engine=True)
    flags = ["--pp-size", "2", "--nnodes", "2", "--served-model-name", MODEL]
    flags += ["--dist-init-addr", f"{hosts[0].address}:{MEETING_PORT}"]
    variables = {
        "SGLANG_NCCL_SO_PATH": "none",
        "GLOO_SOCKET_IFNAME": "eth0",
        # Each rank takes the cores of its place in the engine.
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{BRIDGE_ADDRESS}:{backend.http_port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    engines = [
        Engine(
            newest,
            checkpoints / "a",
            flags=[*flags, "--node-rank", str(host.number)],
            variables=variables,
            port=port,
            exporter_port=EXPORTER_PORT,
            address=host.address,
            within=host.within(checkpoints),
        )
        for host in hosts
    ]
    try:
        for engine in engines:
            engine.start()
        engines[0].wait_until_ready(peers=engines[1:])
        yield engines
    finally:
        for engine in engines:
            engine.stop()


@pytest.fixture(scope="module")
def monitoring(parts: list[Engine]) -> Iterator[Monitoring]:
    targets = [
        {
            "targets": [f"{engine.address}:{engine.exporter_port}"],
            "labels": {"cluster": "test", "namespace": "serving", "pod": f"engine-0-{number}"},
        }
        for number, engine in enumerate(parts)
    ]
    job = "sglang-weights"
    directory = Path(tempfile.mkdtemp(prefix="monitoring-"))
    stack = Monitoring(
        directory,
        {job: ""},
        {job: {"static_configs": targets}},
        hastened={
            "SGLangWeightRanksDisagree",
            "SGLangWeightRanksMissing",
            "SGLangWeightReloadFailed",
        },
    ).start()
    try:
        seen = "count(sglang_weight_engine_nodes) == 2"
        eventually(lambda: stack.query(seen), what="both hosts are scraped")
        yield stack
    finally:
        stack.stop()


def update(parts: list[Engine], checkpoint: Path) -> None:
    """SGLang answers with what the first host's rank says."""
    status, answer = parts[0].update_weights_from_disk(checkpoint)
    assert (status, answer["success"]) == (200, True), answer


def group_of(part: Engine) -> str:
    (info,) = part.scrape().series("sglang_weight_engine_info")
    group: str = info.labels["engine_group"]
    return group


def updates_come_to(parts: list[Engine], *wanted: tuple[int, int]) -> None:
    """How many succeeded on each host, and how many failed. SGLang does not wait for the second."""

    def counted() -> bool:
        scrapes = [part.scrape() for part in parts]
        names = "sglang_weight_updates_total", "sglang_weight_update_failures_total"
        found = [tuple(scrape.one(name, source="disk") for name in names) for scrape in scrapes]
        assert found == list(wanted), found
        return True

    eventually(counted, what=f"{wanted} updates and failures")


def trace(backend: Backend, name: str, number: int) -> list[Span]:
    """Spans of the n-th of its kind, in order of the hosts. They share a trace."""

    def spans() -> list[Span]:
        traces: dict[bytes, list[Span]] = {}
        for span in backend.spans(name):
            traces.setdefault(span.trace_id, []).append(span)
        assert len(traces) == number, f"{len(traces)} traces"
        (latest,) = list(traces.values())[-1:]
        assert len(latest) == 2, f"{len(latest)} spans"
        return latest

    found = eventually(spans, what=f"{number} of {name}")
    return sorted(found, key=lambda span: attributes_of(span)["sglang.weights.node_rank"])


def fires(monitoring: Monitoring, name: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [alert for alert in monitoring.active_alerts(name) if alert["state"] == "firing"]


def resolves(monitoring: Monitoring, name: str) -> None:
    eventually(lambda: not monitoring.active_alerts(name), what=f"{name} resolves")


def test_two_hosts_are_one_engine(
    parts: list[Engine], monitoring: Monitoring, backend: Backend
) -> None:
    scrapes = [part.scrape() for part in parts]
    infos = [scrape.series("sglang_weight_engine_info")[0].labels for scrape in scrapes]
    nodes = [scrape.series("sglang_weight_engine_nodes")[0].labels for scrape in scrapes]
    assert [labels["node_rank"] for labels in nodes] == ["0", "1"]
    assert [info["nodes"] for info in infos] == ["2", "2"]
    assert [info["pp_rank"] for info in infos] == ["0", "1"]
    assert len({info["engine"] for info in infos}) == 1
    (group,) = {info["engine_group"] for info in infos}
    assert group
    for number, part in enumerate(parts):
        assert part.scrape().one("sglang_weight_engine_nodes") == 2
        status = part.exporter_cli("status").stdout
        assert f"host      {number} of 0 to 1 of engine group {group}" in status
    hosts = f'sglang_weight_engine_nodes{{engine_group="{group}",model_name="{MODEL}"}}'
    pods = {series["metric"]["pod"] for series in monitoring.query(hosts)}
    assert pods == {"engine-0-0", "engine-0-1"}
    for span in trace(backend, "sglang.weights.load", 1):
        assert attributes_of(span)["sglang.weights.engine_group"] == group


def test_an_update_of_both_is_one_trace_and_no_alert_of_two(
    parts: list[Engine],
    hosts: list[Host],
    monitoring: Monitoring,
    backend: Backend,
    checkpoints: Path,
) -> None:
    for host in hosts:
        host.write("b", 1)
    update(parts, checkpoints / "b")
    updates_come_to(parts, (1, 0), (1, 0))
    for number, span in enumerate(trace(backend, "sglang.weights.update", 1)):
        assert attributes_of(span)["sglang.weights.pp_rank"] == number
    counted = "count(sum without (source) (sglang_weight_updates_total) == 1) == 2"
    eventually(lambda: monitoring.query(counted), what="Prometheus has the update")
    # Between two scrapes one host is ahead of the other, and that is pending for a moment.
    for name in ("SGLangWeightRanksDisagree", "SGLangWeightRanksMissing"):
        resolves(monitoring, name)


def test_a_host_that_missed_an_update_raises_one_alert_until_it_has_it(
    parts: list[Engine],
    hosts: list[Host],
    monitoring: Monitoring,
    backend: Backend,
    checkpoints: Path,
) -> None:
    """SGLang answers 200, because the first host has the checkpoint."""
    name = "SGLangWeightRanksDisagree"
    last = parts[1].scrape().one("sglang_weight_last_update_start_timestamp_seconds")
    eventually(lambda: time.time() - last > 11, what="ten seconds since the last update began")
    hosts[0].write("c", 2)
    update(parts, checkpoints / "c")
    updates_come_to(parts, (2, 0), (1, 1))
    states = [span.status.code for span in trace(backend, "sglang.weights.update", 2)]
    assert states == [Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR]
    (alert,) = eventually(fires(monitoring, name), what=name)
    wanted = {
        "cluster": "test",
        "namespace": "serving",
        "model_name": MODEL,
        "engine_group": group_of(parts[0]),
        "role": "target",
    }
    assert wanted.items() <= alert["labels"].items()
    assert not {"instance", "pod"} & alert["labels"].keys()
    assert MODEL in alert["annotations"]["summary"]
    failed = "SGLangWeightReloadFailed"
    (alert,) = eventually(fires(monitoring, failed), what=failed)
    assert alert["labels"]["pod"] == "engine-0-1"
    hosts[1].write("c", 2)
    update(parts, checkpoints / "c")
    updates_come_to(parts, (3, 0), (2, 1))
    resolves(monitoring, name)


def test_a_host_that_cannot_be_reached_is_missing_until_it_can(
    parts: list[Engine],
    hosts: list[Host],
    monitoring: Monitoring,
    backend: Backend,
    checkpoints: Path,
) -> None:
    name = "SGLangWeightRanksMissing"
    run("ip", "link", "set", hosts[1].cable, "down")
    try:
        (alert,) = eventually(fires(monitoring, name), what=name)
    finally:
        run("ip", "link", "set", hosts[1].cable, "up")
    assert alert["labels"]["engine_group"] == group_of(parts[0])
    assert alert["annotations"]["summary"].startswith("1 rank(s) of an engine")
    assert monitoring.active_alerts("SGLangWeightRanksDisagree") == []
    resolves(monitoring, name)
    update(parts, checkpoints / "a")
    updates_come_to(parts, (4, 0), (3, 1))
    trace(backend, "sglang.weights.update", 4)


def test_two_hosts_that_share_a_directory_are_one_engine_in_it(
    newest: Installation, tmp_path: Path
) -> None:
    """As containers on one machine do, or hosts with a shared volume: ranks have their name before
    they have met."""
    tiny_model.write(tmp_path / "model", 0)
    port, exporter_port, meeting = free_port(engine=True), free_port(), free_port()
    flags = ["--pp-size", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{meeting}"]
    engines = [
        Engine(
            newest,
            tmp_path / "model",
            flags=[*flags, "--node-rank", str(number)],
            variables={
                "SGLANG_NCCL_SO_PATH": "none",
                "GLOO_SOCKET_IFNAME": "lo",
                "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
                "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": str(tmp_path / "runtime"),
                "SGLANG_WEIGHT_EXPORTER_ADDRESS": "127.0.0.1",
            },
            port=port,
            exporter_port=exporter_port,
            address=f"127.0.0.{1 + number}",
        )
        for number in range(2)
    ]
    try:
        for engine in engines:
            engine.start()
        engines[0].wait_until_ready(peers=engines[1:])
        infos = [each.labels for each in engines[0].scrape().series("sglang_weight_engine_info")]
        assert sorted(info["pp_rank"] for info in infos) == ["0", "1"]
        assert {info["engine"] for info in infos} == {str(port)}
        assert len({info["engine_group"] for info in infos}) == 1
    finally:
        for engine in engines:
            engine.stop()
