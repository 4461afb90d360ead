# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is asked of Prometheus, one module a subject; here what is selected, and how it is named.

Series of one target carry the same labels of the scrape; those that people scrape several clusters
with are named in PLACE, and a label that a store lacks is as good as an empty one. So two pods with
one address in two clusters stay two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

PLACE = "cluster, namespace, job, instance, pod"
GPU = f"{PLACE}, gpu_uuid"
ENGINE = f"{PLACE}, model_name, engine"
RANK = f"{ENGINE}, role, tp_rank, pp_rank, dp_rank, moe_ep_rank, device, gpu_uuid"
TARGET = 'role="target"'
#: One rank of each engine, of what all its ranks have alike.
FIRST = f'{TARGET}, tp_rank=~"0?", pp_rank=~"0?", dp_rank=~"0?"'
#: Bars, or lines of a table, that answer "which ones".
TOP = 10
#: Labels of sglang_weight_info, and of sglang_weight_engine_info, beside those of a rank.
FACTS = "tp_size, pp_size, ep_size, quantization, sglang_version, gpu_name"
ENGINE_FACTS = "model_path, architecture, torch_version, pci_bus_id, engine_group, nodes"


@dataclass(frozen=True)
class Selection:
    """What a board's variables select: label to variable.

    "All" is `.*`, which also matches a label that a store does not add, and the empty gpu_uuid of a
    CPU engine.
    """

    variables: Mapping[str, str]
    at: str = ""
    """Series as they are at the start or at the end of a graph, at each of its points: a store
    works that out once."""
    narrowed: str = ""
    """One more matcher, which holds for what is about a GPU and no rank too."""

    def matchers(self, *without: str) -> str:
        chosen = [
            f'{label}=~"${name}"' for label, name in self.variables.items() if label not in without
        ]
        return ", ".join([*chosen, self.narrowed] if self.narrowed else chosen)

    def series(self, metric: str, extra: str = "") -> str:
        series = f"{metric}{{{self.matchers()}{', ' + extra if extra else ''}}}"
        return self._at(series)

    def by_name(self, name_regex: str) -> str:
        """All series whose names match, in one selector: a missing one (no LoRA) is not a gap."""
        return f'{{__name__=~"{name_regex}", {self.matchers()}}}'

    def of_targets(self, metric: str, extra: str = "") -> str:
        """Series of a target as a whole, which have no labels of a model, an engine or a rank."""
        labels = [label for label in self.variables if label not in PLACE.split(", ")]
        return self._at(f"{metric}{{{self.matchers(*labels)}{', ' + extra if extra else ''}}}")

    def _at(self, series: str) -> str:
        return f"{series} @ {self.at}()" if self.at else series


FLEET = Selection(
    {
        "cluster": "cluster",
        "namespace": "namespace",
        "job": "job",
        "model_name": "model",
        "instance": "instance",
    }
)
ENGINES = Selection({**FLEET.variables, "engine": "engine", "role": "role", "gpu_uuid": "gpu"})


def address(expression: str) -> str:
    """`host`: where it is scraped, without the port."""
    return f'label_replace({expression}, "host", "$1", "instance", "(.*?)(:[0-9]+)?")'


def host(expression: str) -> str:
    """`host`: the pod, where the scrape knows one."""
    return f'label_replace({address(expression)}, "host", "$1", "pod", "(.+)")'


def named(expression: str, *labels: str, name: str = "where") -> str:
    """One label of several for a legend, where one that is missing would show as its own name."""
    joined = ", ".join(f'"{label}"' for label in labels)
    joined = f'label_join({expression}, "{name}", " ", {joined})'
    return f'label_replace({joined}, "{name}", "$1", "{name}", " *(.*?) *")'


def engine_named(expression: str) -> str:
    """`where`: cluster, host and engine."""
    return named(host(expression), "cluster", "host", "engine")


def rank_named(expression: str) -> str:
    """`rank` as SGLang's log has it: tp0 pp1, and dp2 where there is one."""
    for rank in ("tp", "pp", "dp"):
        expression = f'label_replace({expression}, "{rank}", "{rank}$1", "{rank}_rank", "(.+)")'
    return named(expression, "tp", "pp", "dp", name="rank")


def together(series: Mapping[str, str], label: str = "part") -> str:
    """Several expressions as one query, told apart by one label that they do not have."""
    return " or ".join(
        f'label_replace({expression}, "{label}", "{name}", "", "")'
        for name, expression in series.items()
    )


def grown(series: str, most_of: str = "") -> str:
    """Growth of a counter in the time range, in whole numbers and from two samples of each series;
    all of what is new or has begun anew. ``most_of``: labels by which ranks are put together first,
    where every rank counts the same events."""
    now, before = series, f"{series} offset $__range"
    if most_of:
        now, before = (f"max by ({most_of}) ({each})" for each in (now, before))
    return f"({now} - {before} >= 0 or {now})"


def at_end(series: str) -> str:
    """The same wherever a graph is."""
    return f"({series} @ end() - {series} @ end() offset $__range or {series} @ end())"


def at_ends(selection: Selection, of: Callable[[Selection], str]) -> str:
    """What hardly changes, as it is at the end of a graph, and where it has ended as it was at its
    start."""
    return f"({of(replace(selection, at='end'))} or {of(replace(selection, at='start'))})"


def spread(expression: str, *, worst: str) -> str:
    """What many series are without a line for each: `worst` is min or max."""
    names = {"min": "least", "max": "most"}
    return together(
        {
            names[worst]: f"{worst}({expression})",
            "median": f"quantile(0.5, {expression})",
        }
    )


def happened(series: str) -> str:
    """Growth of a counter from one point of the graph to the next: whole numbers, each event in
    exactly one point. increase() would extrapolate, and count an event in several points or none.
    """
    return f"clamp_min({series} - {series} offset $__interval, 0)"
