# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus keeps exemplars, also where it would rather have OpenMetrics 2.0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from collectors import Backend
from engines import http_get
from http_servers import Handler, LocalServer
from monitoring import Monitoring
from otlp.test_metrics import TRACE, BusyRank
from ranks import ExporterProcess
from waiting import eventually

#: What Prometheus 3.15 sends with `--enable-feature=openmetrics2` and OpenMetricsText2.0.0 first in
#: its `scrape_protocols`.
OFFER = (
    "application/openmetrics-text;version=2.0.0;q=0.7,"
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


class Relay(LocalServer):
    """Between Prometheus and the exporter: whatever Prometheus offers becomes this."""

    def __init__(self, exporter: ExporterProcess, offer: str) -> None:
        self.content_types: list[str] = []
        relay = self

        class RelayHandler(Handler):
            def do_GET(self) -> None:
                url = f"http://127.0.0.1:{exporter.port}{self.path}"
                _, headers, body = http_get(url, headers={"Accept": offer})
                relay.content_types.append(headers["content-type"])
                self.reply(body, headers={"Content-Type": headers["content-type"]})

        super().__init__(RelayHandler)


@pytest.fixture
def relay(
    runtime_dir: Path, backend: Backend, start_exporter: Callable[..., ExporterProcess]
) -> Iterator[Relay]:
    """Before an exporter that sends spans, with a rank that was updated."""
    rank = BusyRank(runtime_dir)
    endpoint = f"http://127.0.0.1:{backend.grpc_port}"
    relay = Relay(start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=endpoint), OFFER)
    yield relay
    relay.stop()
    rank.store.close()


def test_a_prometheus_that_offers_openmetrics_2_keeps_exemplars(
    relay: Relay, tmp_path: Path
) -> None:
    began = time.time()
    directory = tmp_path / "prometheus"
    directory.mkdir()
    stack = Monitoring(directory, {"sglang-weights": relay.place}).start()
    try:
        found = eventually(
            lambda: stack.exemplars(
                "sglang_weight_update_duration_seconds_bucket", began - 60, time.time() + 60
            ),
            what="Prometheus has an exemplar",
        )
        assert {each["labels"]["trace_id"] for each in found} == {TRACE}
        assert {each["value"] for each in found} == {"2.5"}
        assert {each.partition(";")[0] for each in relay.content_types} == {
            "application/openmetrics-text"
        }
        assert stack.query("up == 1")
    finally:
        stack.stop()
