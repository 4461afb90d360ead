# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus and Alertmanager for one test session, and what it takes to fill them.

Debian's `prometheus` and `prometheus-alertmanager`; the alerts' webhook is this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.parse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from engines import http_get
from http_servers import Handler, LocalServer
from ports import free_port
from waiting import LIMIT, eventually, forget, watch

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULES = DASHBOARDS / "sglang-weights.rules.yml"
RECORDING = Path(__file__).parents[1] / "dashboards" / "recorded" / "gpu.txt"


def run(*command: str | Path) -> str:
    """Run a command; AssertionError with all that it printed if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


class Webhook(LocalServer):
    """Receives Alertmanager's notifications."""

    def __init__(self) -> None:
        self.notifications: list[dict[str, Any]] = []
        notifications = self.notifications

        class WebhookHandler(Handler):
            def do_POST(self) -> None:
                notifications.append(json.loads(self.read_body()))
                self.reply()

        super().__init__(WebhookHandler)

    def alerts(self, name: str, status: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts that were delivered with this status, the latest last."""
        return [
            alert
            for notification in list(self.notifications)
            for alert in notification["alerts"]
            if alert["status"] == status
            and alert["labels"]["alertname"] == name
            and labels.items() <= alert["labels"].items()
        ]


#: Durations in the expressions of alerts, and what a test waits for instead. How far an expression
#: looks back from there stays: a machine that stalls for minutes loses nothing by it.
HASTENED = (
    (r"time\(\) - 300\b", "time() - 15"),
    (r"time\(\) - 1800\b", "time() - 3"),
    (r"offset 2m\b", "offset 6s"),
    (r"offset (?:5|10)m\b", "offset 15s"),
    (r"offset 30m\b", "offset 20s"),
    (r"offset 1h\b", "offset 30s"),
    (r"\[1[05]m\]", "[15s]"),
    (r"\[(?:1h|30m)\](?! offset)", "[30s]"),
    (r"< (?:3)?600\b", "< 1"),
    (r"> [69]00\b", "> 1"),
    (r"> 120\b", "> 10"),
    (r"\+ 60\b", "+ 1"),
    (r"for: (\d+)m", r"for: \1s"),
)


def hastened_rules(alerts: Collection[str]) -> str:
    """The shipped rules, these alerts with minutes as seconds, so that a test sees them resolve.

    Only those that a test waits for: the others must not depend on how fast the machine is.
    """
    rules = re.split(r"(?m)^(?= +- (?:alert|record): )", RULES.read_text())
    left = set(alerts)
    for index, rule in enumerate(rules):
        named = re.match(r" +- alert: (\w+)", rule)
        if named is None or named[1] not in left:
            continue
        expression, annotations, words = rule.partition("        annotations:\n")
        hastened = expression
        for shipped, in_a_test in HASTENED:
            hastened = re.sub(shipped, in_a_test, hastened)
        assert hastened != expression, f"{named[1]} has no duration"
        rules[index] = hastened + annotations + words
        left.remove(named[1])
    assert not left, f"{RULES.name} has no {left}"
    # No test waits for the minutes between two evaluations of a group.
    return re.sub(r"(?m)^    interval: \S+\n", "", "".join(rules))


@dataclass
class Monitoring:
    """Prometheus and Alertmanager, started by `start` and ended by `stop`."""

    directory: Path
    targets: dict[str, str]
    """Job name to `host:port`, or several with spaces between."""
    scrape: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Job name to what its scrape configuration has besides."""
    hastened: Collection[str] = ()
    """Alerts whose minutes are seconds."""
    own_rules: Sequence[dict[str, Any]] = ()
    """A person's recording rules, which switch alerts on."""
    evaluation_interval: str = "1s"
    notifies: bool = True
    """Whether there is an Alertmanager, and `promtool` checks the configuration first."""
    port: int = field(default_factory=free_port)
    webhook: Webhook = field(default_factory=Webhook)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Prometheus's address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Monitoring:
        """Returns once Prometheus is ready."""
        alertmanager = f"127.0.0.1:{free_port()}"
        (self.directory / "rules.yml").write_text(hastened_rules(self.hastened))
        own = {"groups": [{"name": "own", "rules": list(self.own_rules)}]}
        (self.directory / "own.yml").write_text(yaml.safe_dump(own))
        configuration = {
            # A scrape may take as long as the interval, and two cores are busy with engines.
            "global": {"scrape_interval": "3s", "evaluation_interval": self.evaluation_interval},
            "rule_files": ["rules.yml", "own.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
            "scrape_configs": [
                {
                    "job_name": job,
                    "static_configs": [{"targets": target.split()}],
                    **self.scrape.get(job, {}),
                }
                for job, target in self.targets.items()
            ],
        }
        (self.directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        if self.notifies:
            self._start_alertmanager(alertmanager)
        self._start_prometheus()
        return self

    def _start_alertmanager(self, address: str) -> None:
        receiver = {
            "name": "test",
            "webhook_configs": [{"url": self.webhook.url, "send_resolved": True}],
        }
        route = {
            "receiver": "test",
            "group_by": ["..."],
            "group_wait": "0s",
            "group_interval": "1s",
        }
        (self.directory / "alertmanager.yml").write_text(
            yaml.safe_dump({"route": route, "receivers": [receiver]})
        )
        run("promtool", "check", "config", self.directory / "prometheus.yml")
        self._start(
            "prometheus-alertmanager",
            f"--config.file={self.directory / 'alertmanager.yml'}",
            f"--storage.path={self.directory / 'alertmanager'}",
            f"--web.listen-address={address}",
            "--cluster.listen-address=",
        )

    def _start_prometheus(self) -> None:
        self._start(
            "prometheus",
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
        )
        eventually(lambda: http_get(self.url + "/-/ready")[0] == 200, what="Prometheus is ready")

    def restart(self) -> None:
        """Prometheus anew, which finds the blocks that were written beside it."""
        prometheus = self._processes.pop()
        prometheus.send_signal(signal.SIGTERM)
        prometheus.wait(LIMIT)
        self._start_prometheus()

    def _start(self, *command: str) -> None:
        with watch(self.directory / f"{command[0]}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def processor_seconds(self) -> float:
        """What Prometheus has used of its processor until now."""
        fields = Path(f"/proc/{self._processes[-1].pid}/stat").read_text().rpartition(")")[2]
        user, system = map(int, fields.split()[11:13])
        return (user + system) / os.sysconf("SC_CLK_TCK")

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Instant query. AssertionError with Prometheus's message if it refuses."""
        parameters = {"query": expression, **({} if at is None else {"time": str(at)})}
        found: list[dict[str, Any]] = self._api("query", parameters)["result"]
        return found

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """Range query."""
        parameters = {"query": expression, "start": str(start), "end": str(end), "step": str(step)}
        found: list[dict[str, Any]] = self._api("query_range", parameters)["result"]
        return found

    def exemplars(self, selector: str, start: float, end: float) -> list[dict[str, Any]]:
        """All that it has kept of these series."""
        parameters = {"query": selector, "start": str(start), "end": str(end)}
        return [
            each
            for found in self._api("query_exemplars", parameters)
            for each in found["exemplars"]
        ]

    def active_alerts(self, name: str, **labels: str) -> list[dict[str, Any]]:
        """Alerts that Prometheus holds now, with their labels and annotations."""
        alerts: list[dict[str, Any]] = self._api("alerts", {})["alerts"]
        wanted = {"alertname": name, **labels}
        return [alert for alert in alerts if wanted.items() <= alert["labels"].items()]

    def _api(self, path: str, parameters: dict[str, str]) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        _, _, body = http_get(address)
        answer = json.loads(body)
        assert answer["status"] == "success", f"{answer['error']} in {parameters}"
        return answer["data"]

    def stop(self) -> None:
        """End both, and remove what they wrote."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT)
            process.kill()
        for log in self.directory.glob("*.log"):
            forget(log)
        self.webhook.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


# --- the recording ------------------------------------------------------------------------------


def recorded_scrapes() -> Iterator[tuple[float, dict[str, float]]]:
    """Seconds since the recording began, and all series at that time.

    The file says at each `@` what changed since the one before; `-` is a series that ended.
    """
    series: dict[str, float] = {}
    at: float | None = None
    for line in RECORDING.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("@ "):
            if at is not None:
                yield at, dict(series)
            at = float(line[2:])
        elif line.startswith("- "):
            del series[line[2:]]
        else:
            name, value = line.rsplit(" ", 1)
            series[name] = float(value)
    if at is not None:
        yield at, dict(series)


def replay(directory: Path, end: float, instance: str = "gpu-host:9400") -> str:
    """Write the recording into Prometheus's storage as if it had just ended. Returns its last
    scrape, for :class:`LastScrape`.

    dcgm-exporter, SGLang's own metrics and accounts of memory were not recorded: their series are
    made here, in the shape that those programs give them, from the recorded memory in use.
    """
    scrapes = list(recorded_scrapes())
    shift = end - scrapes[-1][0]
    samples: dict[str, list[tuple[float, float]]] = {}
    for at, series in scrapes:
        for name, value in series.items():
            moment = value + shift if "_timestamp_seconds{" in name and value else value
            labelled = with_labels(name, instance=instance, job="sglang-weights")
            samples.setdefault(labelled, []).append((at + shift, moment))
            for shaped, shaped_value in shaped_like_others(name, value):
                samples.setdefault(shaped, []).append((at + shift, shaped_value))
            for ours, ours_value in accounted_for(name, value):
                ours = with_labels(ours, instance=instance, job="sglang-weights")
                samples.setdefault(ours, []).append((at + shift, ours_value))
    lines = [
        f"{name} {value:.17g} {at:.3f}" for name, points in samples.items() for at, value in points
    ]
    text = directory / "recording.om"
    text.write_text("\n".join([*lines, "# EOF", ""]))
    run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, directory / "data")
    last = [(name, points[-1]) for name, points in samples.items()]
    return "".join(f"{name} {value:.17g}\n" for name, (at, value) in last if at == end)


class LastScrape(LocalServer):
    """Answers every scrape with one text. A host whose recording has ended lives on, for as long as
    a slow machine takes for what is asked about it. Its series have their own `job` and `instance`,
    so a scrape honours labels."""

    def __init__(self, text: str) -> None:
        class ScrapeHandler(Handler):
            def do_GET(self) -> None:
                headers = {"Content-Type": "text/plain; version=0.0.4"}
                self.reply(text.encode(), headers=headers)

        super().__init__(ScrapeHandler)


def with_labels(name: str, **labels: str) -> str:
    more = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name[:-1]},{more}}}" if name.endswith("}") else f"{name}{{{more}}}"


def shaped_like_others(name: str, value: float) -> Sequence[tuple[str, float]]:
    used, pool = "sglang_gpu_memory_used_bytes{", "sglang_kv_pool_resident_bytes{"
    if not name.startswith((used, pool)):
        return []
    labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
    if name.startswith(used):
        gpu = f'gpu="{labels["gpu"]}",UUID="{labels["gpu_uuid"]}",device="nvidia{labels["gpu"]}"'
        dcgm = (
            f'DCGM_FI_DEV_FB_USED{{{gpu},hostname="gpu-host",instance="gpu-host:9401",job="dcgm"}}'
        )
        return [(dcgm, value / 2**20)]
    if name.startswith(pool) and labels["role"] == "target":
        rank = ",".join(f'{key}="{labels[key]}"' for key in ("model_name", "tp_rank", "pp_rank"))
        where = f'instance="gpu-host:{labels["engine"]}",job="sglang"'
        busy = float(value > 0)
        return [
            (f"sglang:token_usage{{{rank},{where}}}", 0.62 * busy),
            (f"sglang:gen_throughput{{{rank},{where}}}", 1850.0 * busy),
        ]
    return []


#: Bytes in use on one of its GPUs while nothing was released.
MOST_USED = 105_756_884_992.0


def accounted_for(name: str, value: float) -> Sequence[tuple[str, float]]:
    """An account of the ranks of engine 30000, of the size that one was measured with; the other
    engine has none, as with an older exporter."""
    if name.startswith("sglang_gpu_memory_used_bytes{"):
        back = max(0.0, MOST_USED - value)
        return [
            (name.replace("_used_", "_used_max_"), value),
            (name.replace("_used_", "_resume_"), back),
        ]
    if name.startswith("sglang_weight_updates_total{"):
        paused = name.replace("_updates_", "_update_paused_seconds_")
        requests = name.replace("_updates_", "_update_requests_").replace("{", '{fate="kept",')
        return [(paused, 1.5 * value), (requests, 7 * value)]
    labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
    kept = name.removeprefix("sglang_kv_pool_resident_bytes{")
    if kept == name or labels["engine"] != "30000" or labels["role"] != "target":
        return []
    parts = {
        "kv_tables": 10_056_592.0,
        "cuda_graphs": 110_378_496.0,
        "other_tensors": 128_315_772.0,
        "rounding": 12_458_228.0,
        "fragments": 18_594_304.0,
        "cached": 0.0,
    }
    totals = {
        "outside_torch": 543_162_368.0,
        "reserved": 1e9 + value,
        "reserved_peak": 1.2e9 + value,
        "update_growth": 0.0,
        "after_release": 1e9,
    }
    return [
        *(
            (f'sglang_rank_memory_bytes{{part="{part}",{kept}', size)
            for part, size in parts.items()
        ),
        *((f"sglang_rank_memory_{total}_bytes{{{kept}", size) for total, size in totals.items()),
    ]
