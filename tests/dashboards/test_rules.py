# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The rules: valid, tested one by one, and the same whatever labels a scrape adds."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import DASHBOARDS, RULES, run
from panel_queries import expressions

from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.views import IDENTITY

ROOT = DASHBOARDS.parent
RULE_TESTS = DASHBOARDS / "sglang-weights.rules.test.yml"

#: What a store of several clusters has on every series.
EAST = {"cluster": "east", "namespace": "serving", "pod": "sglang-0", "job": "pods"}


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@functools.cache
def groups_in(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(text)["groups"]
    return found


def rules_by_name(text: str) -> dict[str, str]:
    """Each rule as it is written, by the name of its alert or of what it records."""
    rules = [rule for group in groups_in(text) for rule in group["rules"]]
    return {rule.get("alert") or rule["record"]: yaml.safe_dump(rule) for rule in rules}


def test_rules_are_valid_and_their_tests_pass() -> None:
    run("promtool", "check", "rules", "--lint-fatal", RULES)
    run("promtool", "test", "rules", RULE_TESTS)


def test_every_alert_is_tested_and_has_a_runbook() -> None:
    names = [rule["alert"] for rule in alerts()]
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    worded = {case["alertname"] for test in tests for case in test.get("alert_rule_test", [])}
    assert worded == set(names)
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert sections == [*dict.fromkeys(sections)]
    assert set(sections) == set(names)
    for rule in alerts():
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}


def kinds(rule: dict[str, Any]) -> set[tuple[str, str]]:
    """An alert, once for each of its reasons where it has some."""
    reasons = re.findall(r'"reason", "(\w+)"', rule["expr"])
    return {(rule["alert"], reason) for reason in reasons or [""]}


def raised(scenario: dict[str, Any]) -> set[tuple[str, str]]:
    """What is expected in a scenario, at whichever moment."""
    labels = [
        dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"]))
        for case in scenario.get("promql_expr_test", [])
        for sample in case["exp_samples"]
        if "ALERTS{" in case["expr"]
    ] + [
        {"alertname": case["alertname"], **alert["exp_labels"]}
        for case in scenario.get("alert_rule_test", [])
        for alert in case["exp_alerts"]
    ]
    return {(each.get("alertname", ""), each.get("reason", "")) for each in labels}


def test_each_alert_earns_its_place_by_a_case_that_no_other_catches() -> None:
    """A scenario that asks for all alerts that fire, and in which no other is expected from its
    beginning to its end. For each reason of an alert one of its own."""
    alone = set()
    for scenario in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        asked = [case["expr"] for case in scenario.get("promql_expr_test", [])]
        everything = any("ALERTS{" in each and "alertname=" not in each for each in asked)
        expected = raised(scenario)
        if everything and len({name for name, _ in expected}) == 1:
            alone |= expected
    for rule in alerts():
        assert kinds(rule) <= alone, rule["alert"]


def test_there_are_no_more_alerts_than_can_be_known() -> None:
    """Where two say the same of two metrics they are one, with a label `reason` that says which."""
    assert len(alerts()) <= 27


def test_a_runbook_is_its_impact_a_query_that_can_be_asked_and_a_command(tmp_path: Path) -> None:
    """In place of an address that nobody can know."""
    queries = []
    for rule in alerts():
        lines = dict(line.split(": ", 1) for line in rule["annotations"]["runbook"].splitlines())
        assert list(lines) == ["Impact", "Query", "Command"]
        queries.append({"record": "asked", "expr": lines["Query"], "labels": {"of": rule["alert"]}})
    (tmp_path / "queries.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "runbooks", "rules": queries}]})
    )
    run("promtool", "check", "rules", tmp_path / "queries.yml")
    assert "example" not in RULES.read_text()


#: Conditions of the rules, each with what is left where it is lost.
LOST = [
    (" > sglang_weight_loaded_timestamp_seconds\n            or 0 *", " > 0\n            or 0 *"),
    ("for: 10m", "for: 1m"),
    ("for: 15m", "for: 1m"),
    ("for: 30m", "for: 1m"),
    ("[1h] offset 5m", "[1s] offset 5m"),
    ("max_over_time(engine:", "last_over_time(engine:"),
    (
        "1 * last_over_time(engine:sglang_weight_reload_timestamp_seconds:max[5m])",
        "1 * engine:sglang_weight_reload_timestamp_seconds:max",
    ),
    (
        "or last_over_time(engine:sglang_weight_reload_timestamp_seconds:max[5m]) <= time() - 300",
        "",
    ),
    ("sglang_weight_update_failures_total offset 10m > 0", "vector(9) > 0"),
    ("          unless engine:sglang_weight_update_in_progress:sum\n", ""),
    ("and on (cluster, namespace, job, instance, model_name, engine) (", "or ("),
    ("== sglang_weight_exporter_ranks_died_in_update_total offset 15m", "== -1"),
    ("and on (cluster, namespace, job, instance) up == 0", ""),
    ("> sum without (source) (sglang_weight_updates_total offset 2m)", "> 1e9"),
    ("> sum without (source) (sglang_weight_update_failures_total offset 2m)", "> 1e9"),
    ("sglang_weight_update_bytes_total == 0\n                or", ""),
    ("and ignoring (source) time() - sglang_weight_loaded_timestamp_seconds > 600", ""),
    (',source!="eplb"', ""),
    ("0 < (\n", "-1 < (\n"),
    ('{role=~"draft.*"} + 60', '{role=~"draft.*"}'),
    ("> on (model_name) group_left () min by", "> 900 or 0 * min by"),
    ('pauses_total{mode="in_place"}) > 0', 'pauses_total{mode="in_place"}) > 99'),
    ("unless sglang_weight_resident_bytes < 0.5", "unless sglang_weight_resident_bytes < 0"),
    ("offset 30m >= 3\n            and", "offset 30m >= 1\n            and"),
    ("  <= sglang_weight_operation_failures_total", "  >= sglang_weight_operation_failures_total"),
    ('operation=~"load_lora_adapter.*"', 'operation=~".+"'),
    ('embedding"} >= 5', 'embedding"} >= 3'),
    ('layer=~"attention|mlp|experts|embedding"', 'layer=~".+"'),
    ('updates_missed{role="target",', "updates_missed{"),
    (
        "unless on (model_name) "
        'sglang_weights:opt_out{alert=~"|SGLangWeightUpdateChangedNothing",layer=""}',
        "",
    ),
    (
        "unless on (model_name, layer) "
        'sglang_weights:opt_out{alert=~"|SGLangWeightUpdateChangedNothing",layer!=""}',
        "",
    ),
    ("unless on (model_name, layer)", "unless on (model_name)"),
    ("adapters:max offset 6h) >= 12", "adapters:max offset 6h) >= 1"),
    ("and resets(engine:sglang_lora_adapters:max[6h]) == 0", ""),
    ("adapters:max offset 2h\n            >= 0.25", "adapters:max >= 0"),
    ("adapters:max offset 4h\n            >= 0.25", "adapters:max >= -1e9"),
    ('unless on (model_name) sglang_weights:opt_out{alert=~"|SGLangLoRAAdaptersGrow"}', ""),
    ("job, model_name, sglang_version) (\n", "job, model_name) (\n"),
    (
        "changes_total offset 15m\n                ) > 0",
        "changes_total offset 15m\n                ) > 1e9",
    ),
    (
        "changes_total offset 1h\n                  ) == 0",
        "changes_total offset 1h\n                  ) >= 0",
    ),
    (
        ") >= 3\n                and\n                quantile",
        ") >= 0\n                and\n                quantile",
    ),
    (
        ") >= 3\n                and\n                max",
        ") >= 0\n                and\n                max",
    ),
    ("<= 2\n              )\n              or", "<= 1e9\n              )\n              or"),
    ("and ignoring (aspect) sglang_lora_adapters == 0", ""),
    ("and ignoring (aspect) time() - sglang_weight_loaded_timestamp_seconds < 3600", ""),
    ("and ignoring (aspect) sglang_lora_adapters > 0", ""),
    ("and ignoring (aspect) time() - sglang_weight_loaded_timestamp_seconds > 300", ""),
    ("> 10\n", "> -1\n"),
    ("> 10\n", "> 60\n"),
    ("> 120\n", "> 1e9\n"),
    ("engine_group, role) (", "role) ("),
    ("loaded_timestamp_seconds > 900", "loaded_timestamp_seconds > -1"),
    ('sglang_weight_engine_info{nodes!~"1?"}', 'sglang_weight_engine_info{nodes="none"}'),
    (">= 0.5 * count by", ">= 0 * count by"),
    (") > time() - 1800", ") > time() - 60"),
    ("quantization, sglang_version, gpu_name\n", "quantization\n"),
    ("_rank,\n                      tp_size", "_rank, instance,\n                      tp_size"),
    ("role, tp_rank, pp_rank, moe_ep_rank,\n", "role,\n"),
    ("cluster, namespace, job, model_name", "job, model_name"),
    (
        "unless on (model_name) "
        'sglang_weights:opt_out{alert=~"|SGLangWeightReplicasDiffer",reason=""}',
        "",
    ),
    (
        "unless on (model_name, reason) "
        'sglang_weights:opt_out{alert=~"|SGLangWeightReplicasDiffer",reason!=""}',
        "",
    ),
    ("unless on (model_name, reason)", "unless on (model_name)"),
    ('unless sglang_weight_tensors_altered_total{during="serving",kind="buffer"}', ""),
    ("sglang_weight_reference_match == 0", "sglang_weight_reference_match"),
    ("manifest_match[5m]) < 0.5\n", "manifest_match[5m]) < 1\n"),
    (
        "avg_over_time(sglang_weight_manifest_match[5m]) < 0.5\n",
        "sglang_weight_manifest_match == 0\n",
    ),
    ("for: 2m", "for: 0m"),
    ("keep_firing_for: 5m", "keep_firing_for: 15m"),
    ("and on (cluster, namespace, job, model_name)\n", "or\n"),
    ("sglang_kv_cache_stale > 0", "sglang_kv_cache_stale"),
    ("0.9 * max by", "2 * max by"),
    ("< 1.1 * quantile", "< 9 * quantile"),
    ("> 0.985", "> 0.5"),
    ('{part="other_processes"}) > 1e9', '{part="other_processes"}) > -1'),
    ("resident_bytes\n            >= 0.5 *", "resident_bytes\n            >= 0 *"),
    ("and sglang_rank_memory_reserved_bytes offset 15m > sglang", "and -1 < sglang"),
    (
        "and min_over_time(sglang_rank_memory_reserved_bytes[15m]) >= max_over_time("
        "sglang_rank_memory_reserved_bytes[15m] offset 15m)",
        "",
    ),
    ("and avg_over_time(sglang_rank_memory_update_growth_bytes[45m]) > 0", ""),
    (") >= 6", ") >= 0"),
    ("and on (cluster, namespace, job, instance) last_over", "or last_over"),
    ('{state="failed"}', '{state!="installed"}'),
    ("read_errors_total offset 30m >= 3", "read_errors_total offset 30m >= 1"),
    ("scrape_duration_seconds > 5", "scrape_duration_seconds > 3"),
    ('{reason!="released"}', "{}"),
    ("unless ignoring (reason) sglang_weight_fingerprint", ""),
    ("and sglang_weight_exporter_ranks offset 30m", ""),
    ("unless on (renamed) vector(0)", ""),
    ('or sglang_weight_updates_total{exported_source!=""}', ""),
    ("max by (UUID) (DCGM", "sum by (UUID) (DCGM"),
    (
        "(sglang_weight_loaded_timestamp_seconds offset 10m)",
        "(sglang_weight_loaded_timestamp_seconds)",
    ),
    ("resets(engine:sglang_weight_version:max[10m]) > 0", "engine:sglang_weight_version:max > 0"),
    (
        'unless on (model_name) sglang_weights:opt_out{alert=~"|SGLangWeightVersionWentBackwards"}',
        "",
    ),
    ("and on (model_name) sglang_weights:updates_keep_requests", ""),
    ('fate=~"kept|retracted"', 'fate=~".+"'),
    (
        '                == sglang_weight_update_requests_total{fate="aborted"} offset 1h\n',
        "                > vector(9e99)\n",
    ),
    (
        'unless sglang_weight_update_requests_total{fate="aborted"}\n'
        '                == sglang_weight_update_requests_total{fate="aborted"} offset 10m',
        "",
    ),
    (
        "+ on (model_name) group_left () min by (model_name) "
        "(sglang_weights:room_to_resume_within_seconds)",
        "+ 1800",
    ),
    (
        "gpu:sglang_gpu_memory_resume_short_timestamp_seconds:min\n          and max",
        "vector(0) - vector(0)\n          and max",
    ),
    (
        "> max without (gpu) (sglang_gpu_memory_total_bytes) "
        "- max without (gpu) (sglang_gpu_memory_used_bytes)",
        ">= 0",
    ),
    ("unless max without (gpu) (max_over_time(sglang_gpu_memory_resume_bytes[2m])) > 0", ""),
    (
        "serving_min1h offset 2h\n              > clamp_min",
        "serving_min1h offset 2h\n              > -9 * clamp_min",
    ),
    (
        "serving_min1h offset 3h\n              > clamp_min",
        "serving_min1h offset 3h\n              > -9 * clamp_min",
    ),
    ("used_bytes:serving) / 6, 5e7)", "used_bytes:serving) / 6, 0)"),
    ("used_bytes:serving) / 6, 5e7)", "used_bytes:serving) / 600, 5e7)"),
    ("> 0.5 * (\n                gpu:", "> 0 * (\n                gpu:"),
    (") > 14400", ") > -1"),
    ('sglang_weight_resident_bytes{gpu_uuid=""}', "vector(0)"),
]


@functools.cache
def worded_scenarios() -> list[tuple[dict[str, Any], str]]:
    """Each scenario, and its text."""
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    return [(test, yaml.safe_dump(test)) for test in tests]


@functools.cache
def outcome(names: frozenset[str], text: str, named: bool) -> str:
    """What promtool says of the rules' tests where there are these rules alone: of the scenarios
    that name one of their alerts, or of the others."""
    rules: dict[str, Any] = {"groups": []}
    for group in groups_in(text):
        kept = [rule for rule in group["rules"] if (rule.get("alert") or rule["record"]) in names]
        rules["groups"] += [{"name": group["name"], "rules": kept}] if kept else []
    # A scenario that has none of the series that a rule reads says nothing about it.
    read = yaml.safe_dump(rules)
    chosen = [
        test
        for test, words in worded_scenarios()
        if any(series["series"].partition("{")[0] in read for series in test["input_series"])
        and named is any(name in words for name in names if ":" not in name)
    ]
    tests = {"rule_files": [RULES.name], "evaluation_interval": "1m", "tests": chosen}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / RULES.name).write_text(yaml.safe_dump(rules))
        run("promtool", "check", "rules", Path(directory) / RULES.name)
        (Path(directory) / RULE_TESTS.name).write_text(yaml.safe_dump(tests))
        done = subprocess.run(
            ["promtool", "test", "rules", RULE_TESTS.name],
            cwd=directory,
            capture_output=True,
            text=True,
        )
    return done.stdout + done.stderr


def is_noticed(lost: tuple[str, str]) -> bool:
    """Whether the rules that a condition is lost from have other alerts than before."""
    condition, without = lost
    text = RULES.read_text()
    assert condition in text
    weakened = text.replace(condition, without)
    rules, weak = rules_by_name(text), rules_by_name(weakened)
    touched = {name for name in rules if weak[name] != rules[name]}
    # What is recorded is tested by the alert that reads it.
    touched |= {name for name in rules for each in touched if ":" in each and each in rules[name]}
    touched |= {each for name in touched for each in rules if ":" in each and each in rules[name]}
    names = frozenset(touched)
    # Mostly by a scenario of its own; the others take ten times as long.
    return any(
        outcome(names, text, named) != outcome(names, weakened, named) for named in (True, False)
    )


def test_the_conditions_whose_loss_is_tried_are_there() -> None:
    """The part `rules` of the release tries them."""
    text = RULES.read_text()
    assert [condition for condition, _ in LOST if condition not in text] == []


@pytest.fixture(scope="module")
def noticed() -> Iterator[dict[Any, Future[bool]]]:
    """For each of LOST whether it is, found out on all cores: promtool takes a second for each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {lost: pool.submit(is_noticed, lost) for lost in LOST}
        pool.shutdown(cancel_futures=True)


@pytest.mark.release("rules")
@pytest.mark.parametrize("lost", LOST)
def test_the_rules_tests_notice_a_lost_condition(
    noticed: dict[Any, Future[bool]], lost: tuple[str, str]
) -> None:
    assert noticed[lost].result()


@pytest.mark.parametrize(
    ("alert", "name"),
    [
        ("SGLangWeightReplicasDiffer", "sglang_weight_info"),
        ("SGLangWeightRanksMissing", "sglang_weight_engine_info"),
    ],
)
def test_a_rule_that_joins_an_info_knows_every_label_of_it(alert: str, name: str) -> None:
    """One that it does not ignore would leave nothing to compare, and no alert would say so."""
    (info,) = (each for each in INSTRUMENTS if each.name == name)
    (rule,) = (rule for rule in alerts() if rule["alert"] == alert)
    joined = rf"ignoring \(([^)]*)\)\s+(?:group_left \([^)]*\)\s+)?{name}\b"
    found = re.findall(joined, rule["expr"])
    assert found
    for ignored in found:
        labels = {label.strip() for label in ignored.split(",")}
        assert labels - {"aspect"} == set(info.labels)


def test_the_rule_of_renamed_labels_knows_every_label() -> None:
    (rule,) = (rule for rule in alerts() if rule["alert"] == "SGLangWeightLabelsRenamed")
    ours = {*IDENTITY, *(label for each in INSTRUMENTS for label in each.labels)}
    assert set(re.findall(r"exported_(\w+)", rule["expr"])) == ours


def test_what_ranks_send_is_not_read_over_long_ranges() -> None:
    """A window of an hour has 240 samples of each series: what needs it reads an engine's recorded
    ones, or is evaluated less often."""
    for group in groups_in(RULES.read_text()):
        for rule in group["rules"]:
            for name, minutes in re.findall(
                r"\b(sglang_\w+)(?:\{[^{}]*\})?\[(\d+)[mh]\]", rule["expr"]
            ):
                seldom = group.get("interval") == "2m" or name.startswith("sglang_weight_exporter_")
                assert seldom or int(minutes) <= 5, (rule, name)


def test_rank_series_are_not_told_apart_by_labels_that_were_forgotten() -> None:
    """Every rank label is either kept or aggregated away by name in the rules."""
    ranks = {"tp_rank", "pp_rank", "dp_rank", "moe_ep_rank"}
    for rule in alerts():
        for labels in re.findall(r"(?:max|min|sum|count) without \(([^)]*)\)", rule["expr"]):
            named = {label.strip() for label in labels.split(",")}
            if "tp_rank" in named:
                assert ranks - named <= {"pp_rank"}, f"{rule['alert']}: {labels}"


# --- labels that the scrape adds ----------------------------------------------------------------


def added(text: str, labels: dict[str, str]) -> str:
    """A series, or a selector, with these labels where it has none of that name."""
    name, _, rest = text.partition("{")
    present = set(re.findall(r"(\w+)=", rest))
    more = [f'{key}="{value}"' for key, value in labels.items() if key not in present]
    return f"{name}{{{','.join([*more, *([rest[:-1]] if rest[:-1] else [])])}}}"


def scenarios() -> list[dict[str, Any]]:
    """The scenarios whose series have no cluster of their own yet."""
    tests: list[dict[str, Any]] = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    return [t for t in tests if not any("cluster=" in s["series"] for s in t["input_series"])]


def of_the_first_cluster(expression: str) -> str:
    """ALERTS or a recorded series: those of EAST alone, where a twin is beside it."""
    if "ALERTS" in expression:
        return expression.replace("ALERTS{", 'ALERTS{cluster="east",')
    by_gpu = "framebuffer" in expression  # joined with another scrape by UUID, without a cluster
    return added(expression, {"UUID": "GPU-a"} if by_gpu else {"cluster": "east"})


def scraped(labels: dict[str, str]) -> dict[str, str]:
    """What the scrape adds to an alert: an alert across instances is of no pod."""
    return {key: value for key, value in EAST.items() if key != "pod" or "instance" in labels}


def in_a_pod(annotations: dict[str, str], labels: dict[str, str]) -> dict[str, str]:
    """Commands are run in the pod that the alert is about, where it is about one."""
    runbook = annotations["runbook"]
    if "instance" in labels:
        runbook = runbook.replace(
            "Command: python3", "Command: kubectl exec -n serving sglang-0 -- python3"
        )
        runbook = re.sub(
            r"look at the engine's log(?=.*( an assertion)?)",
            "kubectl logs -n serving sglang-0"
            + (" --previous" if "an assertion" in runbook else ""),
            runbook,
        )
    return {**annotations, "runbook": runbook}


def in_a_cluster(scenario: dict[str, Any]) -> dict[str, Any]:
    """The same scenario, every series of it, and what is expected of it, with the labels EAST."""
    changed = dict(scenario)
    changed["input_series"] = [
        {**series, "series": added(series["series"], EAST)} for series in scenario["input_series"]
    ]
    changed["promql_expr_test"] = [
        {
            **case,
            "expr": of_the_first_cluster(case["expr"]),
            "exp_samples": [
                {**sample, "labels": added(sample["labels"], EAST)}
                if "instance" in sample["labels"] and " by (" not in case["expr"]
                else sample
                for sample in case["exp_samples"]
            ],
        }
        for case in scenario.get("promql_expr_test", [])
    ]
    changed["alert_rule_test"] = [
        {
            **case,
            "exp_alerts": [
                {
                    **alert,
                    "exp_labels": {**scraped(alert["exp_labels"]), **alert["exp_labels"]},
                    "exp_annotations": in_a_pod(alert["exp_annotations"], alert["exp_labels"]),
                }
                for alert in case["exp_alerts"]
            ],
        }
        for case in scenario.get("alert_rule_test", [])
    ]
    return changed


def with_a_twin(scenario: dict[str, Any], minutes: int) -> dict[str, Any]:
    """A cluster beside it in which the same happens at the same addresses some minutes later.

    The twin's alerts are its own, and are not asked for. GPUs have names that are unique.
    """
    twin = [
        {
            "series": series["series"].replace("east", "west").replace("GPU-", "GPU-west-"),
            "values": f"_x{minutes - 1} {series['values']}",
        }
        for series in scenario["input_series"]
    ]
    return {
        **scenario,
        "input_series": [*scenario["input_series"], *twin],
        "alert_rule_test": [],
    }


def check(directory: Path, scenarios: list[dict[str, Any]]) -> None:
    tests = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": scenarios}
    (directory / "tests.yml").write_text(yaml.safe_dump(tests))
    run("promtool", "test", "rules", directory / "tests.yml")


@pytest.mark.release("rules")
def test_labels_that_a_scrape_adds_stay_on_every_alert(tmp_path: Path) -> None:
    """In every run that of two clusters has them too."""
    assert len(scenarios()) > 15
    check(tmp_path, [in_a_cluster(scenario) for scenario in scenarios()])


def test_a_cluster_with_equal_addresses_changes_nothing(tmp_path: Path) -> None:
    check(tmp_path, [with_a_twin(in_a_cluster(each), minutes=7) for each in scenarios()])


# --- scrapes that are lost ----------------------------------------------------------------------


def samples(notation: str) -> list[str]:
    """Each sample of promtool's notation by itself."""
    found: list[str] = []
    for part in notation.split():
        parsed = re.fullmatch(r"([\d.]+|_|stale)(?:\+([\d.]+))?(?:x(\d+))?", part)
        assert parsed is not None, part
        start, step, more = parsed.groups()
        found += [
            f"{float(start) + float(step) * number:.17g}" if step else start
            for number in range(int(more or 0) + 1)
        ]
    return found


def losing_a_scrape(scenario: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The scenario, in which no target answers in the minute after the alert, and all do again in
    the next. That the alert fires in both."""
    units = dict.fromkeys("hm", 0) | {
        unit: int(number) for number, unit in re.findall(r"(\d+)([hm])", case["eval_time"])
    }
    at = 60 * units["h"] + units["m"]
    step = int(scenario["interval"].removesuffix("m"))
    targets = {
        "{" + ",".join(re.findall(r'\b(?:cluster|namespace|job|instance)="[^"]*"', each["series"]))
        for each in scenario["input_series"]
        if "instance=" in each["series"]
    }
    known = {each["series"] for each in scenario["input_series"]}
    series = [{"series": f"up{each}}}", "values": f"1x{at + 2}"} for each in sorted(targets)]
    series = [each for each in series if each["series"] not in known] + scenario["input_series"]
    lost = []
    for each in series:
        # As if it were scraped each minute.
        values = [one for one in samples(each["values"]) for _ in range(step)] + ["_"] * (at + 3)
        # What a rule of the user's records is not scraped.
        if ":" not in each["series"].partition("{")[0] and values[at + 1] not in "_stale":
            values[at + 1] = "0" if each["series"].startswith("up{") else "stale"
        lost.append({**each, "values": " ".join(values[: at + 3])})
    expected = []
    for alert in case["exp_alerts"]:
        labels = {"alertname": case["alertname"], "alertstate": "firing", **alert["exp_labels"]}
        firing = "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
        expected.append(
            {
                "expr": f"count_over_time(ALERTS{firing}[90s])",
                "eval_time": f"{at + 2}m",
                "exp_samples": [{"labels": firing, "value": 2}],
            }
        )
    return {"interval": "1m", "input_series": lost, "promql_expr_test": expected}


def test_every_alert_goes_on_for_a_while_or_asks_for_more_than_the_last_scrape() -> None:
    """The part `rules` loses a scrape in each of their tests."""
    without = {rule["alert"] for rule in alerts() if rule.get("keep_firing_for") != "5m"}
    assert without == {
        "SGLangWeightsReloaded",
        "SGLangWeightReloadStuck",
        "SGLangWeightExporterDown",
    }


@pytest.mark.release("rules")
def test_a_scrape_that_is_lost_ends_no_alert(tmp_path: Path) -> None:
    """Which would come again with the next one: two notifications more of one fault."""
    lost = [
        (case["alertname"], losing_a_scrape(scenario, case))
        for scenario in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in scenario.get("alert_rule_test", [])
    ]
    assert {name for name, _ in lost} == {rule["alert"] for rule in alerts()}
    check(tmp_path, [scenario for _, scenario in lost])


def test_graphs_see_the_first_update_of_a_source(tmp_path: Path) -> None:
    """Its histogram appears with it. A rank that is seen for the first time has had its updates
    before."""
    labels = 'instance="{}",source="disk"'
    updates = "sglang_weight_updates_total"
    buckets = "sglang_weight_update_duration_seconds_bucket"
    board = json.loads((DASHBOARDS / "sglang-engine.json").read_text())
    asked = [query for title, query, _ in expressions(board) if title == "Update duration"]
    (expression,) = {query for query in asked if query.startswith("sum by (le)")}
    series = [
        (f"{updates}{{{labels.format('here')}}}", "0x5 1x5 2x5"),
        (f'{buckets}{{{labels.format("here")},le="1"}}', "_x6 1x5 2x5"),
        (f"{updates}{{{labels.format('new')}}}", "_x6 5x11"),
        (f'{buckets}{{{labels.format("new")},le="1"}}', "_x6 5x11"),
    ]
    expression = re.sub(r"\{cluster=~[^}]*\}", "", expression).replace("$__interval", "1m")
    scenario = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [
            {
                "expr": expression,
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": '{le="1"}', "value": grown}],
            }
            for minute, grown in ((6, 1), (7, 0), (12, 1), (13, 0))
        ],
    }
    check(tmp_path, [scenario])
