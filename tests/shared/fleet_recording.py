# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A fleet of 64 ranks, made of the recording of one engine with two.

Its versions were not recorded, as they were no numbers there: version 4 is made up for all but the
last engine, which is behind, and but one rank of the one before, which disagrees with its peers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from monitoring import recorded_scrapes, run, shaped_like_others, with_labels

HOSTS = 8
COPIES = 4  # of the two ranks of the recorded engine: eight ranks a host
ENGINE = 'engine="30000"'
OF_TWO_RANKS = re.compile(r'gpu="(\d)"|tp_rank="(\d)"')


def series_of_a_host(name: str, copy: int) -> str | None:
    """The series of the copy's two ranks and GPUs; None for what a host has once."""
    if "engine=" in name and ENGINE not in name:
        return None
    if "{" not in name or not OF_TWO_RANKS.search(name):
        return name if copy == 0 and "exporter" in name else None

    def moved(found: re.Match[str]) -> str:
        return f'{found[1]}"{int(found[2]) + 2 * copy}"'

    name = re.sub(r'(\bgpu=|tp_rank=|moe_ep_rank=)"(\d)"', moved, name)
    return name.replace("cuda:0", f"cuda:{2 * copy}").replace("cuda:1", f"cuda:{2 * copy + 1}")


def samples(end: float) -> Iterator[tuple[str, float, float]]:
    """Series, value and time; host N lies N seconds behind the first one."""
    scrapes = list(recorded_scrapes())
    for number in range(HOSTS):
        address = f"10.0.0.{number + 1}"
        shift = end - scrapes[-1][0] - number
        place = {"cluster": "east", "namespace": "serving", "pod": f"sglang-{number}"}
        for at, series in scrapes:
            for recorded, value in series.items():
                for copy in range(COPIES):
                    name = series_of_a_host(recorded, copy)
                    if name is None:
                        continue
                    name = re.sub(r"(GPU-\w{4})(\w{4})", rf"\g<1>{number:02d}{copy:02d}", name)
                    moment = value + shift if "_timestamp_seconds{" in name and value else value
                    ours = with_labels(name, instance=f"{address}:9400", job="pods", **place)
                    yield ours, moment, at + shift
                    if name.startswith("sglang_weight_loaded_timestamp_seconds{"):
                        odd = number == HOSTS - 2 and 'tp_rank="7"' in name
                        version = 3.0 if odd or number == HOSTS - 1 else 4.0
                        loaded = "sglang_weight_loaded_timestamp_seconds"
                        yield ours.replace(loaded, "sglang_weight_version"), version, at + shift
                    for shaped, shaped_value in shaped_like_others(name, value):
                        theirs = shaped.replace("gpu-host", address)
                        yield with_labels(theirs, **place), shaped_value, at + shift


def replay_fleet(directory: Path, end: float) -> None:
    """Write it into Prometheus's storage as if it had just ended."""
    text = directory / "fleet.om"
    found: dict[str, list[str]] = {}
    for name, value, at in samples(end):
        found.setdefault(name, []).append(f"{name} {value:.17g} {at:.3f}\n")
    with text.open("w") as file:
        for lines in found.values():
            file.writelines(lines)
        file.write("# EOF\n")
    run("promtool", "tsdb", "create-blocks-from", "openmetrics", text, directory / "data")
    text.unlink()
