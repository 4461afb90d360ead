# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The Helm chart, rendered by a real helm over values that people set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from deploy.google import SCHEMAS
from kubernetes_programs import Program
from monitoring import DASHBOARDS, RULES
from panel_page import installed

from sglang_weight_exporter import __version__
from sglang_weight_exporter.settings import DEFAULT_PORT, METRIC_PRESETS

ROOT = DASHBOARDS.parent
CHART = ROOT / "deploy" / "helm" / "sglang-weight-exporter"
PARTS = ROOT / "deploy" / "kustomize" / "workers" / "parts.yaml"

Manifest = dict[str, Any]
Values = dict[str, Any]
Render = Callable[..., dict[str, list[Manifest]]]

#: Values as people set them, by what they are for.
VALUES: dict[str, Values] = {
    "nothing set": {},
    "kube-prometheus-stack": {
        "commonLabels": {"team": "serving"},
        "podMonitor": {
            "namespace": "monitoring",
            "labels": {"release": "kube-prometheus-stack"},
            "namespaceSelector": {"matchNames": ["serving"]},
            "podTargetLabels": ["app"],
            "interval": "",
            "sglang": {"port": 30000},
        },
        "prometheusRule": {
            "labels": {"release": "kube-prometheus-stack"},
            "additionalRuleLabels": {"team": "serving"},
            "disabled": {"SGLangWeightsReloaded": True},
        },
        "dashboards": {
            "namespace": "monitoring",
            "annotations": {"grafana_folder": "SGLang"},
        },
        "networkPolicy": {"enabled": True, "namespace": "serving"},
    },
    "TLS and a closed namespace": {
        "fullnameOverride": "weights",
        "podMonitor": {
            "annotations": {"example.org/owner": "serving"},
            "namespaceSelector": {"any": True},
            "scrapeTimeout": "5s",
            "scheme": "https",
            "tlsConfig": {"ca": {"secret": {"name": "weights", "key": "ca.crt"}}},
            "basicAuth": {
                "username": {"name": "weights", "key": "username"},
                "password": {"name": "weights", "key": "password"},
            },
            "relabelings": [{"targetLabel": "cluster", "replacement": "east"}],
            "metricRelabelings": [
                {
                    "sourceLabels": ["__name__"],
                    "regex": "sglang_weight_update_duration_seconds_bucket",
                    "action": "drop",
                }
            ],
        },
        "networkPolicy": {"enabled": True, "port": 9410, "otherPorts": False},
    },
    "metrics of the exporter alone": {
        "selector": {"matchLabels": {"sglang-weights": None, "app": "llama"}},
        "podMonitor": {"sglang": {"enabled": False}},
        "prometheusRule": {"enabled": False},
        "dashboards": {"enabled": False},
        "networkPolicy": {"enabled": True, "from": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]},
    },
    "Google's": {
        "operator": "google",
        "podMonitor": {
            "podTargetLabels": ["app.kubernetes.io/name"],
            "scrapeTimeout": "5s",
            "sampleLimit": 20000,
            "metrics": "full",
            "sglang": {"port": 30000},
            "scheme": "https",
            "tlsConfig": {"ca": {"secret": {"name": "weights", "key": "ca.crt"}}},
            "basicAuth": {
                "username": "prometheus",
                "password": {"secret": {"name": "weights", "key": "password"}},
            },
            "metricRelabelings": [
                {"action": "drop", "sourceLabels": ["__name__"], "regex": "sglang_weight_x"}
            ],
        },
        "networkPolicy": {"enabled": True},
    },
    "Azure's": {"operator": "azure", "podMonitor": {"namespaceSelector": {"any": True}}},
    "other figures": {
        "podMonitor": {"sampleLimit": 20000, "metrics": "lean"},
        "prometheusRule": {
            "interval": "1m",
            "disabled": {"SGLangKVCacheStale": True},
            "alerts": {"SGLangGPUMemoryTakenByOthers": {"threshold": 0.95, "for": "1h"}},
        },
    },
    "dashboards alone": {
        "podMonitor": {"enabled": False},
        "prometheusRule": {"enabled": False},
        "dashboards": {"labels": {"grafana_dashboard": None, "dashboards": "yes"}},
    },
}


@pytest.fixture
def render(tmp_path: Path, helm: Program) -> Render:
    """What `helm template` makes of the chart, by kind."""

    def render(values: Values) -> dict[str, list[Manifest]]:
        (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
        options = ("--namespace", "serving", "--values", tmp_path / "values.yaml")
        done = helm("template", "release", CHART, *options)
        assert done.returncode == 0, done.stderr
        found: dict[str, list[Manifest]] = {}
        for manifest in yaml.safe_load_all(done.stdout):
            found.setdefault(manifest["kind"], []).append(manifest)
        return found

    return render


def rules(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for group in groups for rule in group["rules"]]


def shipped_rules() -> list[dict[str, Any]]:
    return rules(yaml.safe_load(RULES.read_text())["groups"])


# --- valid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_helm_has_nothing_against_it(helm: Program, tmp_path: Path, name: str) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(VALUES[name]))
    done = helm("lint", "--strict", CHART, "--values", tmp_path / "values.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", VALUES)
def test_what_is_rendered_fits_the_kubernetes_api(render: Render, name: str) -> None:
    rendered = render(VALUES[name])
    for kind in ("ConfigMap", "NetworkPolicy"):
        for manifest in rendered.pop(kind, []):
            kubernetes_validate.validate(manifest, "1.34", strict=True)
    for kind, schema in SCHEMAS.items():
        for manifest in rendered.pop(kind, []):
            jsonschema.validate(manifest, schema)
    assert rendered.keys() <= {"PodMonitor", "PrometheusRule"}


@pytest.mark.release("deployments")
def test_what_is_rendered_fits_the_operator_s_definitions(render: Render, tmp_path: Path) -> None:
    objects = [
        manifest
        for values in VALUES.values()
        for kind in ("PodMonitor", "PrometheusRule")
        for manifest in render(values).get(kind, [])
    ]
    assert len(objects) == 10
    for each in objects:  # Azure's differ from the operator's in the group alone.
        each["apiVersion"] = each["apiVersion"].removeprefix("az")
    page = installed()
    page.check_manifests(objects, tmp_path)
    objects[0]["spec"]["unheard"] = "of"
    with pytest.raises(AssertionError, match=r"unheard.* does not exist"):
        page.check_manifests(objects, tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"podMonitor": {"intervall": "5s"}}, "'intervall' not allowed"),
        ({"podMonitor": {"interval": 5}}, "got number, want string"),
        ({"podMonitor": {"sglang": {"port": "HTTP"}}}, "'HTTP' does not match"),
        ({"podMonitor": {"sglang": {"port": 70000}}}, "70,000"),
        ({"prometheusRule": {"enabled": "yes"}}, "got string, want boolean"),
        ({"dashboards": {"labels": {"grafana_dashboard": 1}}}, "got number, want null or string"),
        # `from` with nobody in it would be everybody.
        ({"networkPolicy": {"from": []}}, "minItems: got 0, want 1"),
        ({"networkPolicy": {"from": None}}, "missing property 'from'"),
        # An empty selector would be every pod.
        ({"selector": None}, "missing property 'selector'"),
        ({"selector": {"matchLabels": None}}, "selector"),
        ({"selector": {"matchLabels": {"sglang-weights": None}}}, "minProperties"),
        ({"podMonitor": None}, "missing property 'podMonitor'"),
        ({"operator": "datadog"}, "operator"),
        ({"podMonitor": {"sampleLimit": -1}}, "sampleLimit"),
        ({"podMonitor": {"metrics": "all"}}, "metrics"),
        ({"prometheusRule": {"disabled": {"SGLangKVCacheStail": True}}}, "There is no alert"),
        ({"prometheusRule": {"alerts": {"SGLangWeightsGone": {"for": "1m"}}}}, "There is no alert"),
        (
            {"prometheusRule": {"alerts": {"SGLangWeightRanksMissing": {"for": "soon"}}}},
            "does not match",
        ),
        ({"operator": "google", "podMonitor": {"namespace": "monitoring"}}, "of its own namespace"),
    ],
)
def test_values_that_are_none_are_refused(
    helm: Program, tmp_path: Path, values: Values, said: str
) -> None:
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm("template", "release", CHART, "--values", tmp_path / "values.yaml")
    assert done.returncode != 0
    assert said in done.stderr


def test_every_value_is_in_the_schema_and_explained() -> None:
    def keys(values: Values, schema: dict[str, Any], path: str = "") -> None:
        for key, value in values.items():
            where = f"{path}.{key}"
            assert key in schema["properties"], where
            below = schema["properties"][key]
            if isinstance(value, dict) and "properties" in below:
                keys(value, below, where)
        # matchExpressions and Helm's own `global` have no default.
        missing = schema["properties"].keys() - values.keys()
        assert missing <= {"global", "matchExpressions", "any", "matchNames"}, path

    schema = json.loads((CHART / "values.schema.json").read_text())
    keys(yaml.safe_load((CHART / "values.yaml").read_text()), schema)


# --- what it says -------------------------------------------------------------------------------


def test_the_chart_is_of_this_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


def test_a_packaged_chart_needs_no_checkout(helm: Program, tmp_path: Path) -> None:
    """Its files are links out of the chart's folder."""
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tgz")
    packaged, here = (helm("template", "release", chart) for chart in (archive, CHART))
    assert packaged.returncode == 0, packaged.stderr
    assert packaged.stdout == here.stdout


def test_the_rules_are_those_of_the_rule_file(render: Render) -> None:
    (plain,) = render({})["PrometheusRule"]
    assert rules(plain["spec"]["groups"]) == shipped_rules()


def test_alerts_are_labelled_left_out_and_led_elsewhere(render: Render) -> None:
    unwanted = {"SGLangWeightsReloaded": True, "SGLangWeightsReleased": False}
    (made,) = render(
        {
            "prometheusRule": {
                "disabled": unwanted,
                "additionalRuleLabels": {"team": "serving", "severity": "page"},
                "runbookUrl": "https://wiki.example.org/weights",
            }
        }
    )["PrometheusRule"]
    before = {rule["alert"]: rule for rule in shipped_rules() if "alert" in rule}
    after = {rule["alert"]: rule for rule in rules(made["spec"]["groups"]) if "alert" in rule}
    assert after.keys() == before.keys() - {"SGLangWeightsReloaded"}
    for name, rule in after.items():
        assert rule["labels"] == {"team": "serving", "severity": "page"}
        url = f"https://wiki.example.org/weights#{name.lower()}"
        assert rule["annotations"] == {**before[name]["annotations"], "runbook_url": url}
        assert rule["expr"] == before[name]["expr"]
    assert [rule for rule in rules(made["spec"]["groups"]) if "record" in rule] == [
        rule for rule in shipped_rules() if "record" in rule
    ]


def test_every_alert_can_be_disabled(render: Render) -> None:
    names = [rule["alert"] for rule in shipped_rules() if "alert" in rule]
    assert "SGLangKVCacheStale" in names
    (made,) = render({"prometheusRule": {"disabled": dict.fromkeys(names, True)}})["PrometheusRule"]
    assert not [rule for rule in rules(made["spec"]["groups"]) if "alert" in rule]


def test_an_alert_has_other_figures(render: Render) -> None:
    name = "SGLangGPUMemoryTakenByOthers"
    own = {"threshold": 0.95, "for": "1h", "labels": {"severity": "info"}}
    values = {"interval": "1m", "alerts": {name: own}}
    (made,) = render({"prometheusRule": values})["PrometheusRule"]
    groups = made["spec"]["groups"]
    assert {group["interval"] for group in groups} == {"1m"}
    before = {rule.get("alert"): rule for rule in shipped_rules()}
    after = {rule.get("alert"): rule for rule in rules(groups)}
    assert after.pop(name) == {
        **before[name],
        "expr": before.pop(name)["expr"].replace("> 0.985", "> 0.95"),
        "for": "1h",
        "labels": {"severity": "info"},
    }
    assert after == before


def test_two_installs_take_nothing_from_each_other(helm: Program, tmp_path: Path) -> None:
    """Two of one name in two namespaces, with their objects in a third; two of two names in one."""
    values = {
        key: {"namespace": "monitoring"} for key in ("podMonitor", "prometheusRule", "dashboards")
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    found = []
    for release, namespace in (("weights", "blue"), ("weights", "green"), ("other", "green")):
        options = ("--namespace", namespace, "--values", tmp_path / "values.yaml")
        done = helm("template", release, CHART, *options)
        assert done.returncode == 0, done.stderr
        for each in yaml.safe_load_all(done.stdout):
            where = each["metadata"]
            found.append((each["kind"], where["namespace"], where["name"]))
    assert len(set(found)) == len(found) > 9


def test_google_s_objects_say_the_same(render: Render) -> None:
    rendered = render(VALUES["Google's"])
    assert rendered.keys() == {"PodMonitoring", "Rules", "ConfigMap", "NetworkPolicy"}
    (monitoring,), (made,) = rendered["PodMonitoring"], rendered["Rules"]
    ours, sglang_s = monitoring["spec"]["endpoints"]
    assert (ours["port"], ours["interval"], ours["timeout"]) == ("weights", "15s", "5s")
    assert sglang_s["port"] == 30000
    assert monitoring["spec"]["limits"] == {"samples": 20000}
    (label,) = monitoring["spec"]["targetLabels"]["fromPod"]
    assert label == {"from": "app.kubernetes.io/name", "to": "app_kubernetes_io_name"}
    # Google's definition of a rule has no `keep_firing_for`.
    known = [
        {key: value for key, value in rule.items() if key != "keep_firing_for"}
        for rule in shipped_rules()
    ]
    assert rules(made["spec"]["groups"]) == known


def test_azure_s_monitor_is_of_its_group_and_has_no_rules(render: Render) -> None:
    rendered = render(VALUES["Azure's"])
    assert rendered.keys() == {"PodMonitor", "ConfigMap"}
    assert rendered["PodMonitor"][0]["apiVersion"] == "azmonitoring.coreos.com/v1"


def test_a_scrape_of_too_many_series_is_refused(render: Render) -> None:
    (monitor,) = render(VALUES["other figures"])["PodMonitor"]
    assert monitor["spec"]["sampleLimit"] == 20000
    assert "sampleLimit" not in render({})["PodMonitor"][0]["spec"]


@pytest.mark.parametrize("preset", METRIC_PRESETS)
@pytest.mark.parametrize(
    ("operator", "kind", "endpoints"),
    [
        ("prometheus", "PodMonitor", "podMetricsEndpoints"),
        ("azure", "PodMonitor", "podMetricsEndpoints"),
        ("google", "PodMonitoring", "endpoints"),
    ],
)
def test_a_preset_is_asked_for_by_the_scrape(
    render: Render, operator: str, kind: str, endpoints: str, preset: str
) -> None:
    """Of the exporter, and not of SGLang, in the word that the endpoint knows."""
    (monitor,) = render({"operator": operator, "podMonitor": {"metrics": preset}})[kind]
    ours, sglang_s = monitor["spec"][endpoints]
    assert ours["params"] == {"metrics": [preset]}
    assert "params" not in sglang_s
    (monitor,) = render({"operator": operator})[kind]
    assert "params" not in monitor["spec"][endpoints][0]


def test_a_selector_that_is_taken_away_is_refused(helm: Program) -> None:
    for taken_away in ("selector=null", "selector.matchLabels=null"):
        done = helm("template", "release", CHART, "--set", taken_away)
        assert done.returncode != 0
        assert "selector" in done.stderr


def test_labels_of_pods_replace_none_of_the_exporter_s(render: Render) -> None:
    """`role` of LeaderWorkerSet's examples, `version` of Istio's."""
    (monitor,) = render({"podMonitor": {"podTargetLabels": ["role", "version"]}})["PodMonitor"]
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert endpoint["honorLabels"] is True


def test_alertmanager_s_configuration_is_that_of_the_compose_file(render: Render) -> None:
    assert "AlertmanagerConfig" not in render({})
    receiver = {"name": "pager", "webhookConfigs": [{"url": "https://pager.example.org/"}]}
    values = {"alertmanagerConfig": {"enabled": True, "receiver": receiver}}
    (made,) = render(values)["AlertmanagerConfig"]
    shipped = yaml.safe_load((DASHBOARDS / "compose" / "alertmanager.yml").read_text())
    route = made["spec"]["route"]
    assert route["receiver"] == "pager"
    assert route["groupBy"] == shipped["route"]["group_by"]
    assert made["spec"]["receivers"] == [receiver]

    def matchers(found: list[dict[str, str]]) -> list[str]:
        return [f'{each["name"]} {each["matchType"]} "{each["value"]}"' for each in found]

    assert [
        {
            "source_matchers": matchers(each["sourceMatch"]),
            "target_matchers": matchers(each["targetMatch"]),
            "equal": each["equal"],
        }
        for each in made["spec"]["inhibitRules"]
    ] == shipped["inhibit_rules"]


def test_grafana_s_sidecar_finds_every_dashboard(render: Render) -> None:
    """kube-prometheus-stack's looks for the label grafana_dashboard with the value 1."""
    maps = render({})["ConfigMap"]
    found = {}
    for each in maps:
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        found.update({name: json.loads(text) for name, text in each["data"].items()})
        # `kubectl apply` keeps the object once more, in an annotation, and the API refuses
        # annotations of more than 256 KiB.
        assert len(json.dumps(each)) < 256 * 1024
    shipped = {path.name: json.loads(path.read_text()) for path in DASHBOARDS.glob("*.json")}
    assert found == shipped
    assert len(maps) == len(shipped) > 1


def test_the_monitor_selects_what_the_component_makes(render: Render) -> None:
    template = yaml.safe_load(PARTS.read_text())["template"]
    (sidecar,) = (
        each for each in template["spec"]["initContainers"] if each["name"] == "weight-exporter"
    )
    (monitor,) = render({})["PodMonitor"]
    labels = monitor["spec"]["selector"]["matchLabels"]
    assert labels == template["metadata"]["labels"]
    ours, sglang_s = monitor["spec"]["podMetricsEndpoints"]
    assert ours["port"] == sidecar["ports"][0]["name"]
    assert sglang_s["port"] == "http"
    (monitor,) = render({"podMonitor": {"sglang": {"port": 30000}}})["PodMonitor"]
    assert monitor["spec"]["podMetricsEndpoints"][1]["portNumber"] == 30000


# --- the network policy -------------------------------------------------------------------------


def allowed(policy: Manifest, port: int | str, protocol: str = "TCP") -> list[Any]:
    """Who may reach a port, as the API defines it; `["all"]` where a rule names nobody."""
    found = []
    for rule in policy["spec"]["ingress"]:
        for each in rule["ports"]:
            last = each.get("endPort", each["port"])
            hit = each["port"] == port
            if isinstance(port, int) and isinstance(last, int):
                hit = each["port"] <= port <= last
            if hit and each["protocol"] == protocol:
                found += rule.get("from", ["all"])
    return found


MONITORING = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
}


def test_only_the_exporter_s_port_is_closed_to_others(render: Render) -> None:
    assert "NetworkPolicy" not in render({})
    (policy,) = render({"networkPolicy": {"enabled": True}})["NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {"matchLabels": {"sglang-weights": "scrape"}}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert allowed(policy, DEFAULT_PORT) == [MONITORING]
    for port in (1, 22, DEFAULT_PORT - 1, DEFAULT_PORT + 1, 30000, 65535):
        assert allowed(policy, port) == ["all"]
    assert allowed(policy, DEFAULT_PORT, "UDP") == allowed(policy, 1, "SCTP") == ["all"]


@pytest.mark.parametrize("port", [1, 65535])
def test_a_port_at_the_end_of_the_range_leaves_no_empty_range(render: Render, port: int) -> None:
    (policy,) = render({"networkPolicy": {"enabled": True, "port": port}})["NetworkPolicy"]
    assert allowed(policy, port) == [MONITORING]
    assert allowed(policy, 30000) == ["all"]
    kubernetes_validate.validate(policy, "1.34", strict=True)
    for rule in policy["spec"]["ingress"]:
        assert all(each["port"] <= each.get("endPort", each["port"]) for each in rule["ports"])


def test_where_others_close_the_pods_only_the_scrape_is_allowed(render: Render) -> None:
    values = {"networkPolicy": {"enabled": True, "otherPorts": False}}
    (policy,) = render(values)["NetworkPolicy"]
    assert allowed(policy, DEFAULT_PORT) == allowed(policy, "http") == [MONITORING]
    assert allowed(policy, 30000) == allowed(policy, 22) == []


def test_the_notes_say_what_is_scraped_and_what_to_look_at(helm: Program) -> None:
    done = helm("install", "release", CHART, "--dry-run=client")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert '{"sglang-weights":"scrape"}' in notes
    assert re.search(r'port named "weights"', notes)
