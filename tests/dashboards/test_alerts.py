# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A reload of a real engine, seen by a real Prometheus, reaches a webhook through Alertmanager."""

from __future__ import annotations

from pathlib import Path

from engines import Engine, eventually
from monitoring import Monitoring


def test_a_reload_raises_one_alert_for_the_engine_and_resolves(
    engine: Engine, monitoring: Monitoring, checkpoints: tuple[Path, Path]
) -> None:
    name, labels = "SGLangWeightsReloaded", {"engine": str(engine.port)}
    before = len(monitoring.webhook.alerts(name, "firing", **labels))

    _, answer = engine.update_weights_from_disk(checkpoints[1])
    assert answer["success"], answer

    fired = eventually(
        lambda: monitoring.webhook.alerts(name, "firing", **labels)[before:], what=name
    )
    # Both ranks changed, and there is one alert.
    assert len({alert["fingerprint"] for alert in fired}) == 1
    assert "tp_rank" not in fired[-1]["labels"]
    assert "dp_rank" not in fired[-1]["labels"]
    assert fired[-1]["labels"]["severity"] == "info"
    eventually(
        lambda: (
            "2 of 2 ranks"
            in monitoring.webhook.alerts(name, "firing", **labels)[-1]["annotations"]["description"]
            or monitoring.query(f'ALERTS{{alertname="{name}",engine="{engine.port}"}}')
        ),
        what="the description counts ranks",
    )
    resolved = eventually(
        lambda: monitoring.webhook.alerts(name, "resolved", **labels),
        60,
        what=f"{name} resolves",
    )
    assert resolved[-1]["fingerprint"] == fired[-1]["fingerprint"]


def test_a_failing_reload_raises_its_own_alert_and_resolves(
    engine: Engine, monitoring: Monitoring
) -> None:
    name, labels = "SGLangWeightReloadFailed", {"engine": str(engine.port)}
    reloads = len(monitoring.webhook.alerts("SGLangWeightsReloaded", "firing", **labels))

    _, answer = engine.update_weights_from_disk(Path("/nowhere/at/all"))
    assert not answer["success"], answer

    fired = eventually(lambda: monitoring.webhook.alerts(name, "firing", **labels), what=name)
    assert len({alert["fingerprint"] for alert in fired}) == 1
    assert fired[-1]["labels"]["source"] == "disk"
    assert fired[-1]["annotations"]["description"].startswith("1 updates from disk failed")
    eventually(
        lambda: monitoring.webhook.alerts(name, "resolved", **labels), 60, what=f"{name} resolves"
    )
    # The weights did not change, so nobody is told that they did.
    later = monitoring.webhook.alerts("SGLangWeightsReloaded", "firing", **labels)
    assert len(later) == reloads


def test_no_other_alert_was_raised(engine: Engine, monitoring: Monitoring) -> None:
    expected = {"SGLangWeightsReloaded", "SGLangWeightReloadFailed"}
    raised = {
        alert["labels"]["alertname"]
        for notification in monitoring.webhook.notifications
        for alert in notification["alerts"]
        if alert["labels"].get("engine") == str(engine.port)
    }
    assert raised <= expected
