# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is shipped in dashboards/ is current, consistent with the exporter, and valid."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import DASHBOARDS, RULES, run

from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.export.views import IDENTITY

ROOT = DASHBOARDS.parent


def rule_expressions() -> list[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


# --- generated ----------------------------------------------------------------------------------


def test_generated_files_are_current() -> None:
    assert generate(ROOT, "--check").returncode == 0


def generate(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dashboards.generate", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_a_stale_file_is_named(tmp_path: Path) -> None:
    shutil.copytree(DASHBOARDS, tmp_path / "dashboards")
    stale = tmp_path / "dashboards" / "sglang-engine.json"
    stale.write_text(stale.read_text().replace("Update groups", "Update clubs"))
    done = generate(tmp_path, "--check")
    assert done.returncode == 1
    assert "sglang-engine.json" in done.stderr
    assert "Update clubs" in stale.read_text()  # --check writes nothing
    assert generate(tmp_path).returncode == 0
    assert "Update clubs" not in stale.read_text()


def test_whoever_publishes_the_documents_has_links_to_them(tmp_path: Path) -> None:
    address = "https://wiki.example/weights"
    arguments = ("--documents", address + "/", "--output", str(tmp_path))
    assert generate(ROOT, *arguments).returncode == 0
    for file in DASHBOARDS.glob("*.json"):
        assert "wiki.example" not in file.read_text()
        assert "documents:" not in file.read_text()
        assert f'"{address}/alerts.md' in (tmp_path / file.name).read_text()
    run("promtool", "check", "rules", tmp_path / RULES.name)
    shipped, linked = (
        {
            rule["alert"]: rule
            for group in yaml.safe_load(path.read_text())["groups"]
            for rule in group["rules"]
            if "alert" in rule
        }
        for path in (RULES, tmp_path / RULES.name)
    )
    for name, rule in linked.items():
        url = rule["annotations"].pop("runbook_url")
        assert url == f"{address}/alerts.md#{name.lower()}"
    assert linked == shipped
    refused = generate(ROOT, "--documents", address)
    assert refused.returncode == 2
    assert "--output" in refused.stderr


#: Labels of the scrape, that the exporter does not serve.
SCRAPED = {"cluster", "namespace", "job", "instance"}

# --- names --------------------------------------------------------------------------------------


def served() -> dict[str, set[str]]:
    """Series that the exporter serves, with their labels, from its own table of instruments."""
    found = {}
    for instrument in INSTRUMENTS:
        labels = {*instrument.labels, *(IDENTITY if instrument.read_role else ())}
        suffixes = {"counter": ["_total"], "gauge": [""]}.get(
            instrument.kind, ["_bucket", "_sum", "_count"]
        )
        for suffix in suffixes:
            found[instrument.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return found


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels, those in closed rows too."""
    return [one for each in dashboard["panels"] for one in (each, *each.get("panels", []))]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]
    found += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    found += [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    return found


def test_only_series_that_the_exporter_serves_are_asked_for(dashboard: dict[str, Any]) -> None:
    names = served()
    for expression in [*expressions(dashboard), *rule_expressions()]:
        for name in re.findall(r"(?<![:\w])sglang_(?:weight|kv|lora|gpu)\w*(?!\w*:)", expression):
            assert name in names, f"{name} in {expression}"
        for name, matchers in re.findall(r"(?<![:\w])(sglang_\w+)\{([^}]*)\}", expression):
            asked = set(re.findall(r"(?:exported_)?(\w+)\s*(?:=~|!=|!~|=)", matchers))
            assert asked <= names[name] | SCRAPED, f"{name}{{{matchers}}}"


# --- the dashboard ------------------------------------------------------------------------------


def test_every_panel_explains_itself(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        if panel["type"] in {"row", "text"}:
            continue
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 30, panel["title"]
        assert len(defaults["noValue"]) > 10, panel["title"]
        if panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"]
        elif panel["type"] != "table":
            assert defaults["unit"], panel["title"]


def test_panels_neither_overlap_nor_leave_the_grid(dashboard: dict[str, Any]) -> None:
    # Panels of a closed row lie below its heading, over the headings of the next ones.
    rows = [panel["panels"] for panel in dashboard["panels"] if panel["type"] == "row"]
    for together in (dashboard["panels"], *rows):
        taken: set[tuple[int, int]] = set()
        for panel in together:
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24, panel["title"]
            taken |= cells
    for key in ("id", "title"):
        values = [panel[key] for panel in panels(dashboard) if panel["type"] != "row"]
        assert len(values) == len(set(values))


def test_what_is_open_is_one_screen_and_rows_are_closed(dashboard: dict[str, Any]) -> None:
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    assert rows == dashboard["panels"][-len(rows) :]
    assert all(row["collapsed"] and row["panels"] for row in rows)
    first = dashboard["panels"][: -len(rows)]
    # 38 pixels each, and what is above them, on 1920x1080.
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in first) <= 25


def test_nothing_is_bound_to_one_grafana(boards: dict[str, Any]) -> None:
    place = ["cluster", "namespace", "job", "model", "instance"]
    engine = [*place, "engine", "role", "gpu", "fullest"]
    selected = {"sglang-fleet": place, "sglang-engine": engine}
    for name, dashboard in boards.items():
        uids = set(re.findall(r'"uid": "([^"]*)"', json.dumps(dashboard)))
        assert uids == {name, "${datasource}"}
        names = [variable["name"] for variable in dashboard["templating"]["list"]]
        assert names == ["datasource", *selected[name]]


def test_links_lead_to_what_is_there(boards: dict[str, Any], tmp_path: Path) -> None:
    """To a board of these two with variables that it has, or to a section of the runbooks."""
    generate(ROOT, "--documents", "https://wiki.example/docs", "--output", str(tmp_path))
    linked = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    text = (ROOT / "docs" / "alerts.md").read_text()
    anchors = {name.lower() for name in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    found = re.findall(r'"url": "([^"]*)"', json.dumps([boards, linked]))
    assert len(found) > 10
    for url in found:
        if url.startswith("https://"):
            page, _, anchor = url.partition("#")
            assert page.endswith("/docs/alerts.md")
            assert anchor in {"", "${__value.text}", *anchors}
        else:
            board = boards[re.fullmatch(r"/d/([\w-]+)(\?.*)?", url)[1]]  # type: ignore[index]
            names = {variable["name"] for variable in board["templating"]["list"]}
            given = {*re.findall(r"[?&]var-(\w+)=", url), *re.findall(r"\{(\w+):queryparam", url)}
            assert given <= names
            if "?" in url:  # A link of the board takes all along, one of a cell says what it takes.
                assert given >= {"datasource", "cluster", "namespace", "job", "instance", "model"}


# --- the command --------------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "dashboard", *map(str, arguments)],
        cwd="/",  # the installed package, and not the checkout
        capture_output=True,
        text=True,
    )


def test_the_command_prints_what_is_shipped() -> None:
    assert command().stdout == (DASHBOARDS / "sglang-fleet.json").read_text()
    assert command("engine").stdout == (DASHBOARDS / "sglang-engine.json").read_text()
    assert command("--rules").stdout == RULES.read_text()


def test_the_command_writes_all_files(tmp_path: Path) -> None:
    done = command("--output", tmp_path / "new" / "directory")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert Path(line).read_text() == (DASHBOARDS / Path(line).name).read_text()
    assert len(done.stdout.splitlines()) == 3


def test_the_command_says_why_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command("--output", tmp_path / "file")
    assert done.returncode == 1
    assert f"{tmp_path / 'file'} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"


# --- deployment ---------------------------------------------------------------------------------


def test_the_compose_file_is_valid_and_complete() -> None:
    compose = DASHBOARDS / "compose"
    specification = pytest.importorskip("compose_spec")
    parsed = yaml.safe_load((compose / "compose.yaml").read_text())
    specification.ComposeSpecification.model_validate(parsed)
    for service in parsed["services"].values():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (compose / source).is_file(), source
            else:
                assert source in parsed["volumes"]


def test_prometheus_and_alertmanager_accept_their_files(tmp_path: Path) -> None:
    shutil.copy(DASHBOARDS / "compose" / "prometheus.yml", tmp_path)
    shutil.copy(RULES, tmp_path)
    run("promtool", "check", "config", tmp_path / "prometheus.yml")
    run("amtool", "check-config", DASHBOARDS / "compose" / "alertmanager.yml")


@pytest.mark.parametrize("block", range(4))
def test_configuration_in_the_documentation_is_accepted(tmp_path: Path, block: int) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    found = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    # The exporter's own is tried on the exporter; Debian's Prometheus knows no native histograms.
    fragments = [
        each for each in found if "tls_server_config" not in each and "_to_nhcb" not in str(each)
    ]
    assert len(fragments) == 4
    fragment = fragments[block]
    for name in ("ca.pem", "prometheus.pem", "prometheus.key", "password"):
        (tmp_path / name).touch()
    if "metric_relabel_configs" in fragment:
        fragment = {"scrape_configs": [{"job_name": "sglang-weights", **fragment}]}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(fragment))
    agent = ["--agent"] if "remote_write" in fragment else []
    run("promtool", "check", "config", *agent, tmp_path / "prometheus.yml")


# --- scrape configurations ----------------------------------------------------------------------


def scrape_configurations() -> dict[str, dict[str, Any]]:
    """Those that are shipped and those that documents show, by file and job."""
    compose = DASHBOARDS / "compose" / "prometheus.yml"
    texts = [(compose, compose.read_text())]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        texts += [(page, block) for block in blocks if "scrape_configs:" in block]
    return {
        f"{path.name} {job['job_name']} {number}": job
        for number, (path, text) in enumerate(texts)
        for job in yaml.safe_load(text)["scrape_configs"]
    }


def test_what_a_scrape_adds_replaces_no_label_of_the_exporter() -> None:
    """`role` of LeaderWorkerSet's examples, `version` of Istio's."""
    found = scrape_configurations()
    assert len(found) > 4
    ours = {name: job for name, job in found.items() if "dcgm" not in name}
    assert {name for name, job in ours.items() if job.get("honor_labels") is not True} == set()
