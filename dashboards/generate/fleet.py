# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The board of the fleet: one screen that says what is wrong now."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from . import DOCUMENTS, variables
from .grafana import (
    NO_NVML,
    NOT_LOADED,
    Json,
    linked,
    override,
    queries,
    query,
    runbook,
    stat,
    table,
    timeseries,
)
from .grafana import (
    board as made,
)
from .queries import FLEET, alerts, engines, exporter, memory, updates
from .rows.memory import gpu_bars

UID = "sglang-fleet"
ENGINE_BOARD = (
    "/d/sglang-engine?${__url_time_range}&var-instance=${__data.fields.Target}"
    "&var-engine=${__data.fields.Engine}&var-model=${__data.fields.Model}"
)


def board() -> Json:
    return made(
        UID,
        "SGLang weights: fleet",
        "What is wrong now, what each engine serves, and how much room its GPUs have. From "
        "sglang-weight-exporter.",
        variables=variables.variables(FLEET),
        links=[variables.to_board("Engine", "sglang-engine"), variables.to_runbooks()],
        first=[*zero_when_healthy(), *now(), *over_time()],
        rows={},
        annotation=partial(variables.updates, FLEET),
    )


def zero_when_healthy() -> list[Json]:
    red = ((None, "green"), (1, "red"))
    orange = ((None, "green"), (1, "orange"))
    return [
        stat(
            "Alerts",
            "Alerts of this project's rules that fire now, without those that only inform.",
            alerts.number_firing(FLEET),
            "short",
            NOT_LOADED,
            *red,
        ),
        linked(
            stat(
                "Engines behind",
                "Engines whose weight version is older than the newest among engines of the same "
                "model, cluster, namespace and job. Only versions that are numbers.",
                engines.behind(FLEET),
                "short",
                "No weight version that is a number",
                *red,
            ),
            runbook("SGLangWeightReplicasDiffer"),
        ),
        linked(
            stat(
                "Failed updates",
                "Updates that failed in the time range, once an engine. A failed update may have "
                "left weights half written.",
                updates.in_range(FLEET, "sglang_weight_update_failures_total"),
                "short",
                NOT_LOADED,
                *red,
            ),
            runbook("SGLangWeightReloadFailed"),
        ),
        linked(
            stat(
                "Tensors moved",
                "Tensors whose address changed in an update in the time range. CUDA graphs keep "
                "the old addresses, so an in-place update should move none.",
                updates.moved_in_range(FLEET),
                "short",
                NOT_LOADED,
                *orange,
            ),
            runbook("SGLangWeightTensorsMoved"),
        ),
        linked(
            stat(
                "Ranks released",
                "Ranks whose weights have no physical memory now: they cannot serve.",
                f"sum({engines.weights_released(FLEET)})",
                "short",
                NOT_LOADED,
                *orange,
            ),
            runbook("SGLangWeightsReleased"),
        ),
        linked(
            stat(
                "Hooks failed",
                "Functions of SGLang, times ranks, that could not be hooked although that release "
                "should have them: updates on those paths are not seen.",
                exporter.hooks_failed(FLEET),
                "short",
                NOT_LOADED,
                *orange,
            ),
            runbook("SGLangWeightExporterIncomplete"),
        ),
    ]


def alert_names() -> list[str]:
    rules = Path(__file__).parents[1] / "sglang-weights.rules.yml"
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def now() -> list[Json]:
    to_runbook = {"title": "Runbook", "url": f"{DOCUMENTS}/alerts.md#${{__value.text}}"}
    # Documents' anchors are in lower case, and a link can only repeat what the cell says.
    anchors = {
        name: {"text": name.lower(), "index": index} for index, name in enumerate(alert_names())
    }
    columns = {
        "Version": engines.version(FLEET),
        "Age": updates.age(FLEET),
        "Ranks": engines.ranks_of_each(FLEET),
        "Weights": engines.weights_of_each(FLEET),
    }
    targets = queries(columns, instant=True, format="table")
    renamed = {f"Value #{target['refId']}": target["legendFormat"] for target in targets}
    to_engine = {"title": "Engine board", "url": ENGINE_BOARD}
    return [
        table(
            "Firing now",
            "Alerts of this project's rules that fire now. The rules have to be loaded into the "
            "store that is asked.",
            [query(alerts.firing(FLEET), instant=True, format="table")],
            [
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": {"Time": True, "Value": True},
                        "indexByName": {
                            name: i
                            for i, name in enumerate(["severity", "short", "where", "alertname"])
                        },
                        "renameByName": {
                            "short": "Alert",
                            "severity": "Severity",
                            "where": "Where",
                            "alertname": "Runbook",
                        },
                    },
                }
            ],
            "Nothing fires, or no rules are loaded",
            override("Severity", custom__width=80),
            override("Where", custom__width=165),
            override(
                "Runbook",
                custom__width=85,
                custom__cellOptions={"type": "data-links"},
                mappings=[{"type": "value", "options": anchors}],
                links=[to_runbook],
            ),
            width=11,
            height=7,
            filterable=False,
        ),
        table(
            "What each engine serves",
            "Version where it is a number, time since its weights last changed (oldest first), "
            "ranks that are alive, and bytes of weights. A click opens the engine's board.",
            targets,
            [
                {"id": "merge", "options": {}},
                {
                    "id": "organize",
                    "options": {
                        "excludeByName": {
                            "Time": True,
                            "cluster": True,
                            "namespace": True,
                            "job": True,
                        },
                        "indexByName": {
                            name: i
                            for i, name in enumerate(["model_name", "instance", "engine", *renamed])
                        },
                        "renameByName": {
                            "model_name": "Model",
                            "instance": "Target",
                            "engine": "Engine",
                            **renamed,
                        },
                    },
                },
                {"id": "sortBy", "options": {"sort": [{"field": "Age", "desc": True}]}},
            ],
            NOT_LOADED,
            {
                "matcher": {"id": "byRegexp", "options": "/.*/"},
                "properties": [{"id": "noValue", "value": "-"}],
            },
            override("Target", custom__width=160, links=[to_engine]),
            override("Engine", custom__width=85, links=[to_engine]),
            override("Version", unit="none", custom__width=85),
            override("Age", unit="s", custom__width=95),
            override("Ranks", unit="none", custom__width=70),
            override("Weights", unit="bytes", custom__width=95),
            width=13,
            height=7,
            filterable=False,
        ),
    ]


def over_time() -> list[Json]:
    return [
        gpu_bars(FLEET, width=10, height=10),
        timeseries(
            "Headroom",
            "Free memory of the GPU with the least, and of the one in the middle (NVML).",
            [query(memory.headroom(FLEET), "{{part}}")],
            "bytes",
            NO_NVML,
            width=4,
            height=10,
            explained_by_updates=True,
        ),
        timeseries(
            "Updates",
            "Logical updates that changed weights, once an engine, by source.",
            [query(updates.by_source(FLEET, "sglang_weight_updates_total"), "{{source}}")],
            "short",
            "No update in this time range",
            width=5,
            height=10,
            bars=True,
            decimals=0,
            calcs=("sum",),
        ),
        timeseries(
            "Update duration",
            "How long updates took on ranks, first call to last, where one ended. A point that is "
            "an exemplar opens its trace.",
            [query(updates.slowest(FLEET), "{{part}}", exemplar=True)],
            "s",
            "No update in this time range",
            width=5,
            height=10,
            points=True,
        ),
    ]
