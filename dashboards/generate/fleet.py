# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The board of the fleet: what is wrong now, by name, on one screen."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from . import DOCUMENTS, variables
from .colours import SOURCES, SPREAD
from .grafana import (
    NO_NVML,
    NOT_LOADED,
    Json,
    coarse,
    dash,
    hidden,
    linked,
    override,
    queries,
    query,
    runbook,
    stat,
    table,
    timeseries,
)
from .layout import board as made
from .queries import FLEET, PLACE, TOP, alerts, engine_named, engines, exporter, memory, updates
from .queries import spread as spread_of
from .rows.exporter import of_a_fleet
from .rows.memory import gpu_bars

UID = "sglang-fleet"
ENGINE_BOARD = (
    "/d/sglang-engine?${__url_time_range}&var-datasource=${datasource}"
    "&${cluster:queryparam}&${namespace:queryparam}&${job:queryparam}"
    "&var-instance=${__data.fields.instance}&var-engine=${__data.fields.engine}"
    "&var-model=${__data.fields.Model}"
)
#: Columns by which queries are put together, and that no reader asks for.
RAW = ["Time", "cluster", "namespace", "job", "pod"]


def board(documents: str = "") -> Json:
    """`documents`: where they are published. A way to them is there only if they are."""
    return made(
        UID,
        "SGLang weights: fleet",
        "Who is behind, who runs out of room, what fires, what changed. From "
        "sglang-weight-exporter.",
        variables=variables.variables(FLEET),
        links=[variables.to_board("Engine", "sglang-engine"), variables.to_runbooks()],
        first=[
            *zero_when_healthy(),
            *by_name(documents),
            what_changed(),
            *map(coarse, over_time()),
        ],
        rows={
            "Memory": [gpu_bars(FLEET, width=12, height=10), headroom()],
            "Exporters": of_a_fleet(FLEET),
        },
        annotation=partial(variables.updates, FLEET),
    )


def zero_when_healthy() -> list[Json]:
    red = ((None, "green"), (1, "red"))
    orange = ((None, "green"), (1, "orange"))
    return [
        stat(
            "Alerts",
            "Alerts of this project's rules that fire now, without those that only inform. What is "
            "about an exporter counts whichever model and target are chosen.",
            alerts.number_firing(FLEET),
            "short",
            NOT_LOADED,
            (None, "orange"),
            (0, "green"),
            (1, "red"),
            words={alerts.NO_RULES: "no rules"},
        ),
        linked(
            stat(
                "Engines behind",
                "Engines that do not have the newest update of their model; below by name.",
                engines.number_behind(FLEET),
                "short",
                NOT_LOADED,
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
                "Ranks released",
                "Ranks whose weights have no physical memory now: they cannot serve.",
                engines.number_released(FLEET),
                "short",
                NOT_LOADED,
                *orange,
            ),
            runbook("SGLangWeightsReleased"),
        ),
        linked(
            stat(
                "Exporters silent",
                "Exporters that have answered within the last hour, and do not now. The row below "
                "has their names.",
                exporter.number_silent(FLEET),
                "short",
                "No exporter has answered within the last hour",
                *orange,
            ),
            runbook("SGLangWeightExporterDown"),
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


def organized(columns: dict[str, str], *hidden: str) -> Json:
    """These columns in this order, by the names of their fields; the rest goes."""
    return {
        "id": "organize",
        "options": {
            "excludeByName": dict.fromkeys(hidden, True),
            "indexByName": {name: i for i, name in enumerate(columns)},
            "renameByName": {name: title for name, title in columns.items() if name != title},
        },
    }


def firing(documents: str) -> Json:
    # Documents' anchors are in lower case, and a link can only repeat what the cell says.
    anchors = {
        name: {"text": name.lower(), "index": index} for index, name in enumerate(alert_names())
    }
    way = override(
        "Runbook",
        custom__width=80,
        custom__cellOptions={"type": "data-links"},
        mappings=[{"type": "value", "options": anchors}],
        links=[{"title": "Runbook", "url": f"{DOCUMENTS}/alerts.md#${{__value.text}}"}],
    )
    columns = {"severity": "Severity", "short": "Alert", "where": "Where"}
    raw = ["Time", "Value"] if documents else ["Time", "Value", "alertname"]
    return table(
        "Firing now",
        "Alerts of this project's rules that fire now, those that only inform left out. The rules "
        "have to be loaded into the store that is asked.",
        [query(alerts.firing(FLEET), instant=True, format="table")],
        [
            organized({**columns, **({"alertname": "Runbook"} if documents else {})}, *raw),
            {"id": "sortBy", "options": {"sort": [{"field": "Severity", "desc": False}]}},
        ],
        "Nothing fires",
        dash(),
        override("Severity", custom__width=75),
        override("Where", custom__width=195),
        *([way] if documents else []),
        width=10,
        height=6,
        filterable=False,
    )


def by_name(documents: str) -> list[Json]:
    to_engine = {"title": "Engine board", "url": ENGINE_BOARD}
    behind = {"For": engine_named(f"({engines.behind(FLEET)})"), "Has": engines.versions(FLEET)}
    behind["Has"] = f"({behind['Has']}) and on ({PLACE}, engine) ({engines.behind(FLEET)})"
    seconds, version = queries(behind, instant=True, format="table")
    room = queries(memory.least_room(FLEET), instant=True, format="table")
    return [
        firing(documents),
        table(
            "Who is behind",
            "Engines that do not have the newest update of their model, what they have, and for "
            "how long there has been a newer one: another version than the engine that was updated "
            "last, or no update within ten minutes of it where half of the engines had one.",
            [seconds, version],
            [
                {"id": "merge", "options": {}},
                organized(
                    {
                        "where": "Engine",
                        "model_name": "Model",
                        "version": "Has",
                        "Value #A": "For",
                        "instance": "instance",
                        "engine": "engine",
                    },
                    *RAW,
                    "host",
                    "Value #B",
                ),
                {"id": "sortBy", "options": {"sort": [{"field": "For", "desc": True}]}},
            ],
            "Nobody is behind",
            dash(),
            override("Engine", links=[to_engine]),
            override("Has", custom__width=98),
            override("For", unit="s", custom__width=84),
            *hidden("instance", "engine", "Model"),
            width=7,
            height=6,
            filterable=False,
        ),
        table(
            "Least room",
            f"The {TOP} GPUs with the least room at the worst moment of the last minute (NVML), "
            "and how much more or less an hour makes it at the pace of the time range.",
            room,
            [
                {"id": "merge", "options": {}},
                organized({"where": "GPU", "Value #A": "Room", "Value #B": "In an hour"}, "Time"),
                {"id": "sortBy", "options": {"sort": [{"field": "Room", "desc": False}]}},
            ],
            NO_NVML,
            dash(),
            override("Room", unit="bytes", decimals=1, custom__width=85),
            override("In an hour", unit="bytes", decimals=1, custom__width=90),
            width=7,
            height=6,
            filterable=False,
        ),
    ]


def what_changed() -> Json:
    columns = {
        "Version": engines.versions(FLEET),
        "Changed": f"{engines.changed_at(FLEET)} * 1000",
        "Took": engines.took(FLEET),
        "Source": updates.sources(FLEET),
        "Weights": engines.weights_of_each(FLEET),
        "Ranks": engine_named(engines.ranks_of_each(FLEET)),
    }
    targets = queries(columns, instant=True, format="table")
    fields = {target["legendFormat"]: f"Value #{target['refId']}" for target in targets}
    numbers = {name: fields[name] for name in ("Changed", "Took", "Ranks", "Weights")}
    to_engine = {"title": "Engine board", "url": ENGINE_BOARD}
    return table(
        "What each engine serves, latest change first",
        "When the weights of each engine last changed, through which source and in how many "
        "seconds (of the last update that succeeded); its version (eight digits of a hash where it "
        "is no number: `status` has the words), ranks that are alive, and bytes of weights. A "
        "click opens the engine's board.",
        targets,
        [
            {"id": "merge", "options": {}},
            organized(
                {
                    numbers["Changed"]: "Changed",
                    "model_name": "Model",
                    "where": "Where",
                    "version": "Version",
                    "source": "Source",
                    numbers["Took"]: "Took",
                    numbers["Ranks"]: "Ranks",
                    numbers["Weights"]: "Weights",
                    "instance": "instance",
                    "engine": "engine",
                },
                *RAW,
                "host",
                *(fields[name] for name in ("Version", "Source")),
            ),
            {"id": "sortBy", "options": {"sort": [{"field": "Changed", "desc": True}]}},
        ],
        NOT_LOADED,
        dash(),
        override("Changed", unit="dateTimeAsIsoNoDateIfToday", custom__width=155),
        override("Where", links=[to_engine]),
        override("Version", custom__width=110),
        override("Source", custom__width=105),
        override("Took", unit="s", decimals=1, custom__width=85),
        override("Ranks", unit="none", custom__width=70),
        override("Weights", unit="bytes", decimals=0, custom__width=95),
        *hidden("instance", "engine"),
        width=24,
        height=6,
        filterable=False,
    )


def headroom() -> Json:
    return timeseries(
        "Headroom",
        "What nobody had in use at the worst moment of each minute (NVML), on the GPU with the "
        "least and on the one in the middle.",
        [query(spread_of(memory.room(FLEET), worst="min"), "{{part}}")],
        "bytes",
        NO_NVML,
        height=10,
        colours={"least": SPREAD["least"], "median": SPREAD["median"]},
        explained_by_updates=True,
    )


def over_time() -> list[Json]:
    return [
        timeseries(
            "Updates",
            "Logical updates that changed weights, once an engine, by source. A point that is an "
            "exemplar opens its trace.",
            [
                query(
                    updates.by_source(FLEET, "sglang_weight_updates_total"),
                    "{{source}}",
                    exemplar=True,
                )
            ],
            "short",
            "No update in this time range",
            height=8,
            bars=True,
            decimals=0,
            calcs=("sum",),
            colours=SOURCES,
        ),
        timeseries(
            "Update duration",
            "How long the last update of each engine took on its first rank, first call to last, "
            "where one ended: the slowest engine, and the one in the middle.",
            [query(updates.slowest(FLEET), "{{part}}")],
            "s",
            "No update in this time range",
            height=8,
            points=True,
            colours={"slowest": SPREAD["slowest"], "median": SPREAD["median"]},
        ),
    ]
