# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The web configuration file: who is let in, what is refused in words, what a change does."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from serving import Exporter
from waiting import LIMIT, eventually

from sglang_weight_exporter.export.authenticator import Authenticator
from sglang_weight_exporter.export.web_configuration import (
    WebConfiguration,
    WebConfigurationError,
    WebConfigurationSource,
)
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.rank import RankStore
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

#: Go's bcrypt made it of the password "fakepassword" (exporter-toolkit's web/handler.go).
HASH = "$2y$10$QOauhQNbBCuQDKes6eFzPeMqBSjb7Mr5DUmpZ/VcEd00UAV/LDeSi"


def authorization(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


PROMETHEUS = authorization("prometheus", "fakepassword")


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def directory(tmp_path: Path, authority: trustme.CA) -> Path:
    """A certificate, its key and the authority that signed it."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    return tmp_path


Started = Callable[[str], Exporter]


@pytest.fixture
def configured(serve: Callable[..., Exporter], directory: Path, rank: RankStore) -> Started:
    """Start an exporter with this file."""

    def start(text: str) -> Exporter:
        (directory / "web.yml").write_text(text)
        exporter = serve("--web.config.file", str(directory / "web.yml"))
        exporter.line("metrics are at")
        return exporter

    return start


TLS = "tls_server_config: {cert_file: cert.pem, key_file: key.pem"


def handshake(
    exporter: Exporter,
    authority: trustme.CA,
    client: trustme.LeafCert | None = None,
    adjust: Callable[[ssl.SSLContext], object] = lambda _: None,
) -> tuple[int, str, bytes]:
    """Status of a scrape over TLS, the cipher suite, and the server's certificate."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    adjust(context)
    connection = http.client.HTTPSConnection(
        "127.0.0.1", exporter.port, timeout=LIMIT, context=context
    )
    try:
        connection.request("GET", "/metrics")
        secured = connection.sock
        assert isinstance(secured, ssl.SSLSocket)
        cipher, certificate = secured.cipher(), secured.getpeercert(binary_form=True)
        assert cipher is not None
        assert certificate is not None
        return connection.getresponse().status, cipher[0], certificate
    finally:
        connection.close()


REFUSED = (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)


def test_the_configuration_in_the_documentation_is_served(
    configured: Started, directory: Path, authority: trustme.CA
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (block,) = (each for each in blocks if "tls_server_config" in each)
    (directory / "cert.pem").rename(directory / "server.pem")
    (directory / "key.pem").rename(directory / "server.key")
    exporter = configured(block)
    client = authority.issue_cert("prometheus.monitoring.svc")
    assert handshake(exporter, authority, client)[0] == 401  # It has no password.
    with pytest.raises(REFUSED):
        handshake(exporter, authority, authority.issue_cert("grafana.monitoring.svc"))


@pytest.mark.slow
def test_users_are_let_in_by_password_and_see_every_page(configured: Started) -> None:
    exporter = configured(f"basic_auth_users:\n  prometheus: {HASH}\n  42: {HASH}\n")
    for path in ("/metrics", "/healthz", "/", "/nowhere"):
        status, headers, body = exporter.request(path)
        assert (status, body) == (401, b"Unauthorized.\n")
        assert headers["www-authenticate"].startswith("Basic")
    for wrong in (
        authorization("prometheus", "fakepasswor"),
        authorization("prometheus", ""),
        authorization("", "fakepassword"),
        authorization("grafana", "fakepassword"),
        authorization("prometheus", "fakepassword\0"),
        authorization("prometheus", "x" * 200),
        PROMETHEUS.replace("Basic", "Bearer"),
        "Basic",
        "Basic äöü",
        "Basic /////w==",
    ):
        assert exporter.request("/metrics", authorization=wrong)[0] == 401, wrong
    for right in (PROMETHEUS, PROMETHEUS.replace("Basic", "basic")) * 2:
        status, _, body = exporter.request("/metrics", authorization=right)
        assert status == 200
        assert b"sglang_weight_bytes{" in body
    assert exporter.request("/healthz", authorization=authorization("42", "fakepassword"))[0] == 200


def test_headers_are_those_of_every_answer(configured: Started) -> None:
    exporter = configured(
        "http_server_config:\n  http2: false\n  headers:\n    X-Frame-Options: deny\n"
        "    Content-Security-Policy:\n    Strict-Transport-Security: max-age=31536000\n"
    )
    for path, expected in (("/metrics", 200), ("/nowhere", 404)):
        status, headers, _ = exporter.request(path)
        assert status == expected
        assert headers["x-frame-options"] == "deny"
        assert headers["strict-transport-security"] == "max-age=31536000"
        assert "content-security-policy" not in headers


def test_more_requests_than_the_rate_are_refused(configured: Started) -> None:
    exporter = configured("rate_limit: {interval: 1h, burst: 3}\n")
    statuses = [exporter.request("/metrics")[0] for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


def test_the_rate_comes_back_with_time() -> None:
    now = 100.0
    authenticator = Authenticator(clock=lambda: now)
    authenticator.use(WebConfiguration(interval=0.5, burst=2))
    assert [authenticator.is_within_rate() for _ in range(3)] == [True, True, False]
    now += 0.4
    assert not authenticator.is_within_rate()
    now += 0.1
    assert [authenticator.is_within_rate() for _ in range(2)] == [True, False]
    now += 3600
    assert [authenticator.is_within_rate() for _ in range(3)] == [True, True, False]


def test_clients_are_asked_for_certificates(configured: Started, authority: trustme.CA) -> None:
    exporter = configured(
        f"{TLS}, client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert,\n"
        "  client_allowed_sans: [prometheus, '::1', 'spiffe://cluster/prometheus']}\n"
    )
    for allowed in ("prometheus", "::1"):
        assert handshake(exporter, authority, authority.issue_cert(allowed))[0] == 200
    for refused in (
        None,
        trustme.CA().issue_cert("prometheus"),
        authority.issue_cert("grafana"),
        authority.issue_cert("prometheus.example"),
    ):
        with pytest.raises(REFUSED):
            handshake(exporter, authority, refused)


def test_a_certificate_is_verified_if_it_is_given(
    configured: Started, authority: trustme.CA
) -> None:
    exporter = configured(
        f"{TLS}, client_ca_file: ca.pem, client_auth_type: VerifyClientCertIfGiven}}\n"
    )
    assert handshake(exporter, authority)[0] == 200
    assert handshake(exporter, authority, authority.issue_cert("prometheus"))[0] == 200
    with pytest.raises(REFUSED):
        handshake(exporter, authority, trustme.CA().issue_cert("prometheus"))


def test_a_version_that_is_too_old_is_refused(configured: Started, authority: trustme.CA) -> None:
    def only_12(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    exporter = configured(f"{TLS}, min_version: TLS13}}\n")
    assert handshake(exporter, authority)[0] == 200
    with pytest.raises(REFUSED):
        handshake(exporter, authority, adjust=only_12)


def test_the_variable_names_the_file_as_well(
    directory: Path, serve: Callable[..., Exporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "web.yml").write_text(f"basic_auth_users: {{prometheus: {HASH}}}\n")
    monkeypatch.setenv("SGLANG_WEIGHT_EXPORTER_WEB_CONFIG_FILE", str(directory / "web.yml"))
    exporter = serve()
    exporter.line("metrics are at")
    assert exporter.request("/metrics")[0] == 401


@pytest.mark.slow
def test_a_change_is_in_force_for_the_next_connection(
    configured: Started, directory: Path, authority: trustme.CA, runtime_dir: RuntimeDir
) -> None:
    exporter = configured("{}")
    assert exporter.request("/metrics")[0] == 200
    kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=LIMIT)
    kept.request("GET", "/metrics")
    kept.getresponse().read()

    (directory / "web.yml").write_text(f"basic_auth_users: {{prometheus: {HASH}}}\n")
    exporter.line("was read again")
    assert exporter.request("/metrics")[0] == 401
    with contextlib.suppress(ConnectionError, http.client.RemoteDisconnected):
        kept.request("GET", "/metrics")  # A connection that was open before is asked as well.
        assert kept.getresponse().status == 401
    assert exporter.request("/metrics", authorization=PROMETHEUS)[0] == 200

    (directory / "web.yml").write_text(f"{TLS}}}\nbasic_auth_users: {{prometheus: {HASH}}}\n")
    exporter.line("metrics are at https://")
    assert handshake(exporter, authority)[0] == 401

    # As Kubernetes does it: a link is swapped, and the file that it is part of stays.
    (directory / "other").mkdir()
    other = authority.issue_cert("127.0.0.1", common_name="another")
    other.private_key_and_cert_chain_pem.write_to_path(str(directory / "other" / "pem"))
    for name in ("cert.pem", "key.pem"):
        (directory / "link").symlink_to(directory / "other" / "pem")
        (directory / "link").rename(directory / name)
    exporter.line("was read again")
    _, _, certificate = handshake(exporter, authority)
    subject = x509.load_der_x509_certificate(certificate).subject
    assert "another" in subject.rfc4514_string()

    shutil.copyfile(directory / "ca.pem", directory / "new")
    (directory / "new").rename(directory / "cert.pem")  # Half of a rotation, or a mistake.
    line = exporter.line("stays in force")
    assert "no such pair" in line
    assert handshake(exporter, authority)[0] == 401
    status = subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "status"],
        env={**os.environ, "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR": str(runtime_dir.path)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert "https://" in status.stdout
    assert "no such pair" in status.stdout + status.stderr

    (directory / "web.yml").unlink()  # Nobody is let in because a file is gone.
    exporter.line("No such file")
    assert handshake(exporter, authority)[0] == 401


#: TLS, certificates of clients and a password.
CLOSED = f"""{TLS}, client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert,
  client_allowed_sans: [prometheus]}}
basic_auth_users: {{prometheus: {HASH}}}
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("\n# nothing\n", "it is empty"),
        ("{}", "has TLS no longer"),
        (f"basic_auth_users: {{prometheus: {HASH}}}\n", "has TLS no longer"),
        (f"{TLS}}}\nbasic_auth_users: {{prometheus: {HASH}}}\n", "has the certificates of clients"),
        (CLOSED.partition("basic_auth_users")[0], "has `basic_auth_users` no longer"),
        (CLOSED.replace("client_allowed_sans: [prometheus]", ""), "has `client_allowed_sans` no l"),
    ],
)
def test_what_is_closed_is_not_opened_by_a_change(
    text: str, words: str, configured: Started, directory: Path, authority: trustme.CA
) -> None:
    exporter = configured(CLOSED)
    (directory / "web.yml").write_text(text)
    assert "stays in force" in exporter.line(words)
    with pytest.raises((OSError, http.client.HTTPException)):
        exporter.request("/metrics")
    with pytest.raises(REFUSED):
        handshake(exporter, authority)
    client = authority.issue_cert("prometheus")
    assert handshake(exporter, authority, client)[0] == 401


def test_settings_of_a_former_release_open_nothing(
    serve: Callable[..., Exporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_WEIGHT_EXPORTER_TLS_CERT_FILE", "/etc/cert.pem")
    exporter = serve()
    line = exporter.line("SGLANG_WEIGHT_EXPORTER_TLS_CERT_FILE is no longer read")
    assert "No metrics are served until that changes" in line
    with pytest.raises(ConnectionRefusedError):
        exporter.request("/metrics")


@pytest.mark.slow
def test_a_file_that_cannot_be_used_serves_nobody_until_it_can(
    serve: Callable[..., Exporter], directory: Path
) -> None:
    (directory / "web.yml").write_text("basic_auth_user: {}\n")
    exporter = serve("--web-config-file", str(directory / "web.yml"))
    line = exporter.line("basic_auth_user")
    assert f"{directory / 'web.yml'} cannot be used" in line
    assert "No metrics are served" in line
    with pytest.raises(ConnectionRefusedError):
        exporter.request("/metrics")
    (directory / "web.yml").write_text("basic_auth_users: {}\n")
    exporter.line("metrics are at")
    assert exporter.request("/metrics")[0] == 200


@pytest.mark.slow
def test_clients_that_do_not_end_their_handshake_end_nothing(
    serve: Callable[..., Exporter], directory: Path, authority: trustme.CA
) -> None:
    (directory / "web.yml").write_text(f"{TLS}}}\n")
    exporter = serve("--web.config.file", str(directory / "web.yml"), descriptors=256)
    exporter.line("metrics are at")
    sockets = exporter.open_sockets()
    clients = []
    for _ in range(800):
        clients.append(socket.socket())
        clients[-1].setblocking(False)
        clients[-1].connect_ex(("127.0.0.1", exporter.port))
    assert handshake(exporter, authority)[0] == 200
    eventually(lambda: exporter.open_sockets() <= sockets + 1, what="sockets are let go")
    assert list(exporter.lines.queue) == []
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tls_server_confg: {}", "unknown field `tls_server_confg`"),
        ("tls_server_config: {certfile: a}", "unknown field `certfile` - at `tls_server_config`"),
        ("http_server_config: {http3: true}", "unknown field `http3`"),
        ("http_server_config: {http2: perhaps}", "Expected `bool`, got `str`"),
        ("http_server_config: {headers: {Server: x}}", "header 'Server' cannot be set, only"),
        ("http_server_config: {headers: {X-Frame-Options: all}}", "none of deny, sameorigin"),
        (
            'http_server_config: {headers: {X-XSS-Protection: "a\\r\\nSet-Cookie: b"}}',
            "cannot be sent",
        ),
        ("basic_auth_users: {prometheus: }", "user 'prometheus' is no bcrypt hash"),
        ("basic_auth_users: {prometheus: secret}", "htpasswd"),
        (f"basic_auth_users: {{a: {HASH}, a: {HASH}}}", "key `a` comes twice"),
        ("rate_limit: {interval: 1}", "'1' is no duration"),
        ("rate_limit: {interval: 1s}", "`burst`"),
        ("rate_limit: {interval: 1s, burst: many}", "Expected `int`"),
        (f"{TLS}, client_auth_type: Ask}}", "none of NoClientCert"),
        (f"{TLS}, client_auth_type: RequestClientCert}}", "nobody would verify"),
        (f"{TLS}, client_auth_type: RequireAnyClientCert}}", "nobody would verify"),
        (f"{TLS}, client_auth_type: RequireAndVerifyClientCert}}", "needs a `client_ca_file`"),
        (f"{TLS}, client_ca_file: ca.pem}}", "no `client_auth_type`"),
        (f"{TLS}, client_allowed_sans: [a]}}", "needs client_auth_type"),
        (f"{TLS}, min_version: SSL30}}", "Invalid enum value 'SSL30'"),
        (f"{TLS}, min_version: TLS13, max_version: TLS12}}", "above `max_version`"),
        (f"{TLS}, cipher_suites: [TLS_AES_128_GCM_SHA256]}}", "`cipher_suites` is not supported"),
        (f"{TLS}, curve_preferences: [X25519]}}", "`curve_preferences` is not supported"),
        (f"{TLS}, prefer_server_cipher_suites: false}}", "cannot be false"),
        ("tls_server_config: {cert_file: cert.pem}", "HTTPS needs `key_file`"),
        (f"{TLS}, key: x}}", "`key` is not supported"),
        ("tls_server_config: {cert: x}", "`cert` is not supported"),
        ("tls_server_config: {cert_file: none.pem, key_file: key.pem}", "No such file"),
        ("tls_server_config: {cert_file: key.pem, key_file: key.pem}", "no such pair"),
        ("tls_server_config: {cert_file: cert.pem, key_file: secret.pem}", "no such pair"),
        ("tls_server_config: {cert_file: fifo, key_file: key.pem}", "no regular file"),
        ("tls_server_config: [", "it is no YAML"),
        ("\x00", "it is no YAML"),
        ("[" * 100_000, "nested too deeply"),
        ("- tls_server_config", "Expected `object`, got `array`"),
        ("&a {basic_auth_users: *a}", "it is no YAML"),
        ("tls_server_config: !!python/object:os.system {}", None),
        ("basic_auth_users:", None),
        ("{}", None),
        ("# nothing", "it is empty"),
        ("", "it is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    text: str, complaint: str | None, directory: Path
) -> None:
    os.mkfifo(directory / "fifo")
    key = serialization.load_pem_private_key((directory / "key.pem").read_bytes(), None)
    (directory / "secret.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    (directory / "web.yml").write_text(text)
    source = WebConfigurationSource(Settings(web_config_file=directory / "web.yml"), {})
    if complaint is None:
        assert source.read() == WebConfiguration()
    else:
        with pytest.raises(WebConfigurationError, match="cannot be used") as error:
            source.read()
        assert complaint in str(error.value)
        assert str(error.value).count("\n") == 0


def odd_certificate(authority: trustme.CA, directory: Path, names: bytes) -> tuple[str, str]:
    """A client's certificate and key, with these alternative names as DER has them."""
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    signing = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "odd")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(issuer.not_valid_before_utc)
        .not_valid_after(issuer.not_valid_after_utc)
        .add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), names), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    (directory / "odd.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "odd.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(directory / "odd.pem"), str(directory / "odd.key")


#: An IP address of five bytes.
FIVE_BYTES = bytes((0x30, 7, 0x87, 5, 1, 2, 3, 4, 5))


def test_an_address_of_odd_length_is_no_name(
    configured: Started, authority: trustme.CA, directory: Path
) -> None:
    asks = f"{TLS}, client_ca_file: ca.pem, client_auth_type: RequireAndVerifyClientCert"
    exporter = configured(f"{asks}}}\n")
    certificate = odd_certificate(authority, directory, FIVE_BYTES)

    def present(context: ssl.SSLContext) -> None:
        context.load_cert_chain(*certificate)

    assert handshake(exporter, authority, adjust=present)[0] == 200
    (directory / "web.yml").write_text(f"{asks}, client_allowed_sans: [prometheus]}}\n")
    exporter.line("was read again")
    with pytest.raises(REFUSED):
        handshake(exporter, authority, adjust=present)
    assert handshake(exporter, authority, authority.issue_cert("prometheus"))[0] == 200


def test_the_end_of_the_process_is_no_error_of_requests_under_way(configured: Started) -> None:
    exporter = configured(f"basic_auth_users: {{prometheus: {HASH}}}\n")
    waiting = []
    for number in range(8):
        waiting.append(socket.create_connection(("127.0.0.1", exporter.port)))
        wrong = authorization("prometheus", f"wrong{number}")
        waiting[-1].sendall(
            f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: {wrong}\r\n\r\n".encode()
        )
    assert exporter.request("/healthz")[0] == 401
    exporter.process.terminate()
    assert exporter.process.wait(LIMIT) == 0
    for each in waiting:
        each.close()
    assert [line for line in exporter.lines.queue if "Traceback" in line] == []
