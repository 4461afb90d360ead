# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus with a scrape configuration of each kind against one web configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from monitoring import Monitoring
from serving import Exporter
from waiting import eventually

from sglang_weight_exporter.store.rank import RankStore

#: Go's bcrypt made it of the password "fakepassword" (exporter-toolkit's web/handler.go).
HASH = "$2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi"

PASSWORD: dict[str, Any] = {"basic_auth": {"username": "prometheus", "password": "fakepassword"}}
WRONG_PASSWORD: dict[str, Any] = {"basic_auth": {"username": "prometheus", "password": "false"}}


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Callable[..., Monitoring]]:
    """Start Prometheus with these scrape configurations of one target."""
    started = []

    def start(exporter: Exporter, jobs: dict[str, dict[str, Any]]) -> Monitoring:
        directory = tmp_path / "prometheus"
        directory.mkdir()
        targets = dict.fromkeys(jobs, f"127.0.0.1:{exporter.port}")
        started.append(Monitoring(directory, targets, scrape=jobs).start())
        return started[-1]

    yield start
    for stack in started:
        stack.stop()


def is_up(stack: Monitoring) -> dict[str, bool]:
    """Of each job that has been scraped whether that went well."""
    return {each["metric"]["job"]: each["value"][1] == "1" for each in stack.query("up")}


def test_certificates_passwords_and_both(
    serve: Callable[..., Exporter],
    rank: RankStore,
    tmp_path: Path,
    stacks: Callable[..., Monitoring],
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("127.0.0.1", "prometheus", "grafana"):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(
            str(tmp_path / f"{name}.pem")
        )
    (tmp_path / "web.yml").write_text(
        f"""
tls_server_config:
  cert_file: 127.0.0.1.pem
  key_file: 127.0.0.1.pem
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: ca.pem
  client_allowed_sans: [prometheus]
http_server_config:
  headers:
    Strict-Transport-Security: max-age=31536000
    X-Content-Type-Options: nosniff
basic_auth_users:
  prometheus: {HASH}
"""
    )
    exporter = serve("--web.config.file", str(tmp_path / "web.yml"))
    exporter.line("metrics are at https://")

    def over_tls(client: str = "") -> dict[str, Any]:
        pem = {"cert_file": f"{tmp_path / client}.pem", "key_file": f"{tmp_path / client}.pem"}
        return {
            "scheme": "https",
            "tls_config": {"ca_file": str(tmp_path / "ca.pem"), **(pem if client else {})},
        }

    expected = {
        "right": ({**over_tls("prometheus"), **PASSWORD}, True),
        "wrong password": ({**over_tls("prometheus"), **WRONG_PASSWORD}, False),
        "no password": (over_tls("prometheus"), False),
        "another's certificate": ({**over_tls("grafana"), **PASSWORD}, False),
        "no certificate": ({**over_tls(), **PASSWORD}, False),
        "no TLS": (PASSWORD, False),
    }
    stack = stacks(exporter, {job: configuration for job, (configuration, _) in expected.items()})
    eventually(lambda: len(is_up(stack)) == len(expected), what="every job was scraped")
    assert is_up(stack) == {job: admitted for job, (_, admitted) in expected.items()}
    assert {each["metric"]["job"] for each in stack.query("sglang_weight_bytes")} == {"right"}


def test_tls_alone(
    serve: Callable[..., Exporter],
    rank: RankStore,
    tmp_path: Path,
    stacks: Callable[..., Monitoring],
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pem = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    (tmp_path / "web.yml").write_text(
        "tls_server_config: {cert_file: server.pem, key_file: server.pem}\n"
    )
    exporter = serve("--web.config.file", str(tmp_path / "web.yml"))
    exporter.line("metrics are at https://")
    tls = {"scheme": "https", "tls_config": {"ca_file": str(tmp_path / "ca.pem")}}
    stack = stacks(exporter, {"known": tls, "unknown": {"scheme": "https"}})
    eventually(lambda: len(is_up(stack)) == 2, what="both jobs were scraped")
    assert is_up(stack) == {"known": True, "unknown": False}


def test_a_password_alone_and_a_rate(
    serve: Callable[..., Exporter],
    rank: RankStore,
    tmp_path: Path,
    stacks: Callable[..., Monitoring],
) -> None:
    (tmp_path / "web.yml").write_text(
        f"basic_auth_users: {{prometheus: {HASH}}}\nrate_limit: {{interval: 100ms, burst: 20}}\n"
    )
    exporter = serve("--web.config.file", str(tmp_path / "web.yml"))
    exporter.line("metrics are at http://")
    stack = stacks(exporter, {"right": PASSWORD, "wrong": WRONG_PASSWORD, "none": {}})
    eventually(lambda: len(is_up(stack)) == 3, what="every job was scraped")
    assert is_up(stack) == {"right": True, "wrong": False, "none": False}
