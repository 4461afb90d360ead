# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A reload of a real engine, seen by a real Prometheus, reaches a webhook through Alertmanager."""

from __future__ import annotations

from pathlib import Path

from engines import Engine
from monitoring import Monitoring
from waiting import eventually


def delivered(monitoring: Monitoring, engine: Engine, name: str, status: str) -> int:
    return len(monitoring.webhook.alerts(name, status, engine=str(engine.port)))


RELOADED, FAILED = "SGLangWeightsReloaded", "SGLangWeightReloadFailed"


def wait_until_quiet(monitoring: Monitoring, engine: Engine) -> None:
    """Other tests share the engine and may have updated it a moment ago: that has raised its alert,
    which has resolved, and both were delivered."""
    scrape, its = engine.scrape(), f'engine="{engine.port}"'
    updated, loaded = (
        max(sample.value for sample in scrape.series(f"sglang_weight_{what}_timestamp_seconds"))
        for what in ("last_update", "loaded")
    )
    # Where the rule looks for reloads that are none any more.
    known = f"engine:sglang_weight_reload_timestamp_seconds:max{{{its}}}[30s] offset 15s"

    def is_known() -> bool:
        found = monitoring.query(f"max(max_over_time({known}))")
        return bool(found) and float(found[0]["value"][1]) >= updated

    if updated > loaded:
        eventually(is_known, what="the reload before is known")
    mine = f'ALERTS{{{its},alertname=~"{RELOADED}|{FAILED}"}}'
    eventually(lambda: not monitoring.query(mine), what="no alert")

    def all_resolved() -> bool:
        last: dict[str, str] = {}
        for notification in list(monitoring.webhook.notifications):
            for alert in notification["alerts"]:
                if alert["labels"].get("engine") == str(engine.port):
                    last[alert["labels"]["alertname"]] = alert["status"]
        return all(last.get(name) != "firing" for name in (RELOADED, FAILED))

    eventually(all_resolved, what="the end of each alert is delivered")


def test_a_reload_raises_one_alert_for_the_engine_and_resolves(
    engine: Engine, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    name, labels = RELOADED, {"engine": str(engine.port)}
    wait_until_quiet(monitoring, engine)
    fired_before = delivered(monitoring, engine, name, "firing")
    resolved_before = delivered(monitoring, engine, name, "resolved")

    _, answer = engine.update_weights_from_disk(checkpoints[1])
    assert answer["success"], answer

    eventually(
        lambda: any(
            "2 of 2 ranks changed" in alert["annotations"]["description"]
            for alert in monitoring.active_alerts(name, **labels)
        ),
        what="Prometheus holds an alert that counts both ranks",
    )
    fired = eventually(
        lambda: monitoring.webhook.alerts(name, "firing", **labels)[fired_before:], what=name
    )
    # Both ranks changed, and there is one alert.
    assert len({alert["fingerprint"] for alert in fired}) == 1
    assert fired[-1]["labels"].keys().isdisjoint({"tp_rank", "dp_rank", "device"})
    assert fired[-1]["labels"]["severity"] == "info"
    resolved = eventually(
        lambda: monitoring.webhook.alerts(name, "resolved", **labels)[resolved_before:],
        what=f"{name} resolves",
    )
    assert resolved[-1]["fingerprint"] == fired[-1]["fingerprint"]


def test_a_failing_reload_raises_its_own_alert_and_resolves(
    engine: Engine, monitoring: Monitoring
) -> None:
    name, labels = FAILED, {"engine": str(engine.port)}
    wait_until_quiet(monitoring, engine)
    fired_before = delivered(monitoring, engine, name, "firing")
    resolved_before = delivered(monitoring, engine, name, "resolved")
    reloads = delivered(monitoring, engine, RELOADED, "firing")

    _, answer = engine.update_weights_from_disk(Path("/nowhere/at/all"))
    assert not answer["success"], answer

    fired = eventually(
        lambda: monitoring.webhook.alerts(name, "firing", **labels)[fired_before:], what=name
    )
    assert len({alert["fingerprint"] for alert in fired}) == 1
    assert fired[-1]["labels"]["source"] == "disk"
    assert fired[-1]["annotations"]["description"].startswith("1 of the updates from disk failed")
    eventually(
        lambda: delivered(monitoring, engine, name, "resolved") > resolved_before,
        what=f"{name} resolves",
    )
    # The weights did not change, so no reload is reported, nor the one before it again.
    assert delivered(monitoring, engine, RELOADED, "firing") == reloads


def test_no_other_alert_was_raised(engine: Engine, monitoring: Monitoring) -> None:
    expected = {RELOADED, FAILED}
    # Its first update, by another test, was of the checkpoint that it had.
    expected.add("SGLangWeightUpdateChangedNothing")
    raised = {
        alert["labels"]["alertname"]
        for notification in monitoring.webhook.notifications
        for alert in notification["alerts"]
        if alert["labels"].get("engine") == str(engine.port)
    }
    assert raised <= expected
