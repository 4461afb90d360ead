# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a fleet costs a real Prometheus: fleet.py [HOSTS [SECONDS]] [OPTION...]

By default 125 hosts of 8 ranks, 1,000 GPUs, scraped every 15 s for 240 s, as `serve --simulate 1x8`
serves them, and the shipped rules as often. Five exporters that were started a few seconds apart
stand for all hosts: each is scraped under many `instance` labels, and relabelling gives every host
GPUs of its own. What one rank has is counted first. 1,250 hosts take 5 GB of memory.

  --interval SECONDS  between scrapes and between evaluations
  --drop REGEX        leaves series out by name at the scrape, as `metric_relabel_configs` do
  --rules FILE        others than those that are shipped
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from scrape import scrape

from sglang_weight_exporter.simulation import ROUND_SECONDS

RULES = Path(__file__).parents[1] / "dashboards" / "sglang-weights.rules.yml"
EXPORTERS, RANKS = 5, 8

#: Families that are there only where somebody has switched fingerprints on.
FINGERPRINTS = (
    "sglang_weight_fingerprint",
    "sglang_weight_tensors_altered",
    "sglang_weight_updates_without_change",
)
ACCOUNT = "sglang_rank_memory_"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def exporter(port: int, *arguments: str) -> Iterator[None]:
    """A real exporter process."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "sglang_weight_exporter", "serve"),
            *("--port", str(port), "--address", "127.0.0.1", *arguments),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: bool(scrape(port)), 30, "the exporter answers")
        yield
    finally:
        process.send_signal(signal.SIGINT)  # Simulated ranks remove their directory.
        process.wait()


def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Ask again until it is so."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if holds():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"After {seconds:.0f} s it is still not so that {what}.")
        time.sleep(0.5)


def names(text: str, **labels: str) -> collections.Counter[str]:
    """How many series of each name have these labels."""
    found: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if not line.startswith("#") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            found[re.split(r"[{ ]", line, maxsplit=1)[0]] += 1
    return found


# --- series a rank ------------------------------------------------------------------------------


def text_of(port: int) -> str:
    return gzip.decompress(scrape(port)[1]).decode()


def count_by_rank() -> None:
    """Series of one rank of each kind; the first simulated engine is updated from disk, and the
    third one has a draft model."""
    port = free_port()
    with exporter(port, "--simulate", "3x1"):
        texts = [text_of(port)]
        done = "sglang_weight_update_duration_seconds_count"
        # The first updates come seconds after the start.
        assert not names(texts[0])[done], "the exporter answered too late for a rank as loaded"
        until(
            lambda: names(text_of(port), engine="30002", source="tensor")[done] == 2,
            60,
            "every engine was updated",
        )
        texts.append(text_of(port))
    print(f"Series of one simulated rank\n  {'':<32}{'as loaded':>10}{'updated':>9}")
    groups: dict[str, Callable[[str], bool]] = {
        "": lambda name: not name.startswith((ACCOUNT, *FINGERPRINTS)),
        ", account of memory": lambda name: name.startswith(ACCOUNT),
        ", fingerprints": lambda name: name.startswith(FINGERPRINTS),
    }
    for role, engine in (("target", "30000"), ("draft", "30002")):
        for group, belongs in groups.items():
            loaded, updated = (
                sum(n for name, n in names(text, role=role, engine=engine).items() if belongs(name))
                for text in texts
            )
            print(f"  {role + group:<32}{loaded:>10}{updated:>9}")
    loaded, updated = (names(text, gpu="0").total() for text in texts)
    print(f"  {'its GPU':<32}{loaded:>10}{updated:>9}")


# --- Prometheus ---------------------------------------------------------------------------------


class Prometheus:
    """Debian's, or whichever is on the path, with its storage in a directory."""

    def __init__(self, directory: Path, configuration: dict[str, Any]) -> None:
        (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = (directory / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            until(lambda: bool(self._get("/-/ready")), 60, "Prometheus is ready")
        except TimeoutError:
            self.close()
            raise

    def close(self) -> None:
        self._process.kill()  # What it has is thrown away.
        self._process.wait()
        self._log.close()

    def _get(self, path: str, **parameters: str) -> bytes:
        address = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=60) as response:
            content: bytes = response.read()
            return content

    def query(self, expression: str) -> float:
        """The only value of the answer; 0 where there is none."""
        answer = json.loads(self._get("/api/v1/query", query=expression))["data"]["result"]
        return float(answer[0]["value"][1]) if answer else 0.0

    def rule_groups(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._get("/api/v1/rules"))["data"]["groups"]
        return found

    def own(self) -> dict[str, float]:
        """What it says of itself, by series."""
        lines = self._get("/metrics").decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


def configuration(
    ports: list[int], hosts: int, interval: int, drop: str, rules: Path
) -> dict[str, Any]:
    """Each target is an exporter under another instance, with GPUs of its own."""
    own = [
        {
            "source_labels": [label, "instance"],
            "regex": rf"{before}(.+);host-(\d+):9400",
            "target_label": label,
            "replacement": replacement,
        }
        for label, before, replacement in (
            ("gpu_uuid", "GPU-.{8}", "GPU-${2}${1}"),
            ("engine_group", "", "${1}${2}"),
        )
    ]
    dropped = [{"source_labels": ["__name__"], "regex": drop, "action": "drop"}] if drop else []
    return {
        "global": {"scrape_interval": f"{interval}s", "evaluation_interval": f"{interval}s"},
        "rule_files": [str(rules.resolve())],
        "scrape_configs": [
            {
                "job_name": "sglang-weights",
                "metric_relabel_configs": [*dropped, *own],
                "static_configs": [
                    {
                        "targets": [f"127.0.0.1:{ports[host % len(ports)]}"],
                        "labels": {"instance": f"host-{host:08d}:9400"},
                    }
                    for host in range(hosts)
                ],
            }
        ],
    }


def fleet(hosts: int, seconds: int, interval: int, drop: str, rules: Path) -> None:
    """Let Prometheus scrape and evaluate for so long, and print what that took."""
    # So that no engine does the same at the same time as all others.
    apart = ROUND_SECONDS / EXPORTERS
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(EXPORTERS):
            began = time.monotonic()
            ports.append(free_port())
            stack.enter_context(exporter(ports[-1], "--simulate", f"1x{RANKS}"))
            time.sleep(max(0.0, began + apart - time.monotonic()))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prometheus = Prometheus(directory, configuration(ports, hosts, interval, drop, rules))
        stack.callback(prometheus.close)
        up, evaluations = "up{job='sglang-weights'}", "prometheus_rule_evaluations_total"
        until(lambda: prometheus.query(f"sum({up})") == hosts, 300, f"{hosts} hosts are up")
        before = prometheus.own()
        began = time.monotonic()
        scrapes = seconds // interval
        until(
            lambda: prometheus.query(f"min(count_over_time({up}[1h]))") >= scrapes,
            2 * seconds + 60,
            f"each host was scraped {scrapes} times",
        )
        after = prometheus.own()
        took = time.monotonic() - began
        appended, missed = (
            sum(after[name] - before.get(name, 0.0) for name in after if name.startswith(prefix))
            for prefix in (
                "prometheus_tsdb_head_samples_appended_total",
                "prometheus_rule_group_iterations_missed_total",
            )
        )
        groups = prometheus.rule_groups()
        assert sum(after[name] for name in after if name.startswith(evaluations)), "no rule ran"
        failures = sum(rule["health"] != "ok" for group in groups for rule in group["rules"])
        series = prometheus.query("sum(scrape_samples_post_metric_relabeling)")
        recorded = prometheus.query('count({__name__=~"(gpu|engine):sglang_.+"})')
        text = text_of(ports[0])
        packed = len(scrape(ports[0])[1])
        load = os.getloadavg()[0]
        (version,) = re.findall(r'prometheus_build_info\{.*version="([^"]+)"', "\n".join(after))

    ranks = hosts * RANKS
    plain = names(text)
    of_a_rank = names(text, tp_rank="0").total()
    of_its_gpu = names(text, gpu="0").total()
    own_of_a_host = plain.total() - RANKS * (of_a_rank + of_its_gpu)
    print(
        f"{hosts:,} hosts, {ranks:,} ranks, every {interval} s by Prometheus {version}, after"
        f" {took:.0f} s (load {load:.1f})"
    )
    print(f"  series of the scrapes     {series:,.0f}, {series / ranks:.1f} a GPU")
    if not drop:
        print(f"    a rank, its GPU, a host {of_a_rank}, {of_its_gpu}, {own_of_a_host}")
    print(f"  samples a second          {appended / took:,.0f}, with those of rules")
    print(f"  one host's scrape         {len(text):,} bytes, {packed:,} with gzip")
    print(f"  network, with gzip        {hosts * packed / interval / 1e3:,.0f} kB/s")
    print(f"  resident memory           {after['process_resident_memory_bytes'] / 1e9:.2f} GB")
    processor = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    print(f"  processor                 {processor / took:.2f} cores")
    print(f"  series of recording rules {recorded:,.0f}")
    print(f"  rules that failed         {failures}; evaluations left out: {missed:.0f}")
    taken = {
        name.split(";")[1].split('"')[0]: value
        for name, value in after.items()
        if name.startswith("prometheus_rule_group_last_duration_seconds")
    }
    print(f"  seconds of {interval} for each group of rules, and for its slowest rule")
    for group in sorted(groups, key=lambda each: -taken[each["name"]]):
        slowest = max(group["rules"], key=lambda rule: float(rule["evaluationTime"]))
        print(
            f"    {group['name']:<28}{taken[group['name']]:>7.2f}"
            f"{slowest['evaluationTime']:>7.2f} {slowest['name']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("hosts", type=int, nargs="?", default=125)
    parser.add_argument("seconds", type=int, nargs="?", default=240)
    parser.add_argument("--interval", type=int, default=15, metavar="SECONDS")
    parser.add_argument("--drop", default="", metavar="REGEX")
    parser.add_argument("--rules", type=Path, default=RULES, metavar="FILE")
    arguments = parser.parse_args()
    if shutil.which("prometheus") is None:
        sys.exit("`prometheus` is not on the path: on Debian, `apt-get install prometheus`.")
    count_by_rank()
    fleet(arguments.hosts, arguments.seconds, arguments.interval, arguments.drop, arguments.rules)


if __name__ == "__main__":
    main()
