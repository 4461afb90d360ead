# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Who may reach the endpoint, and how: the web configuration file that Prometheus and its exporters
share (prometheus/exporter-toolkit, docs/web-configuration.md).

Where this differs: a file that cannot be used changes nothing while one that could is in force;
HTTP/1.1 is spoken whatever ``http2`` says; and what Python's ``ssl`` cannot do is refused in words:
certificates of clients that nobody verifies, and more than one curve.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from sglang_weight_exporter.settings import PREFIX, Settings
from sglang_weight_exporter.store.files import read_file

#: A web configuration and the certificates that it may hold take some kilobytes.
_LIMIT = 1 << 20

#: ``crypt`` format: version, cost, salt and hash.
_BCRYPT = re.compile(r"\$2[abxy]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
_TlsVersion = Literal["TLS10", "TLS11", "TLS12", "TLS13"]

#: Go's names of the suites that can be chosen, and OpenSSL's. Those of TLS 1.3 cannot: all of them
#: are offered, whatever is listed.
_SUITES = {
    f"TLS_ECDHE_{key}_WITH_{go}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for go, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"),
        ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"),
        ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
    )
}
_SUITES_OF_TLS13 = {
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
}

_CURVES = {
    "CurveP256": "prime256v1",
    "CurveP384": "secp384r1",
    "CurveP521": "secp521r1",
    "X25519": "X25519",
}

#: Headers that may be set, with the values that are accepted; none: any.
_HEADERS: dict[str, tuple[str, ...]] = {
    "Content-Security-Policy": (),
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
}

_VERIFYING = {
    "": ssl.CERT_NONE,
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}

#: Go's durations, in seconds.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class WebConfigurationError(Exception):
    """It cannot be used; the message is one sentence that says what and where."""


class _Section(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    pass


class _Tls(_Section, frozen=True):
    cert: str = ""
    key: str = ""
    client_ca: str = ""
    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    client_auth_type: str = ""
    client_allowed_sans: tuple[str, ...] = ()
    min_version: _TlsVersion = "TLS12"
    max_version: _TlsVersion = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True
    curve_preferences: tuple[str, ...] = ()


class _Http(_Section, frozen=True):
    http2: bool = True
    headers: dict[str, str] = msgspec.field(default_factory=dict)


class _RateLimit(_Section, frozen=True):
    interval: str = "0"
    burst: int = 0


class _File(_Section, frozen=True):
    tls_server_config: _Tls = _Tls()
    http_server_config: _Http = _Http()
    basic_auth_users: dict[str, str] = msgspec.field(default_factory=dict)
    rate_limit: _RateLimit = _RateLimit()


@dataclass(frozen=True)
class WebConfiguration:
    """What is in force for a connection and its requests."""

    #: ``None``: plain HTTP.
    tls: ssl.SSLContext | None = None
    #: If not empty, a client's certificate has one of these subject alternative names.
    allowed_sans: frozenset[str] = frozenset()
    headers: dict[str, str] = field(default_factory=dict)
    #: Users and the bcrypt hashes of their passwords; none: nobody is asked.
    users: dict[str, str] = field(default_factory=dict)
    #: Seconds in which one more request may come; 0: no limit.
    interval: float = 0.0
    #: How many may come at once.
    burst: int = 0


class WebConfigurationSource:
    """The file that a setting names, or the three TLS settings, which are a shorthand for one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: What was read, and its state before that: what changes meanwhile is read again.
        self._seen: dict[Path, object] = {}

    def has_changed(self) -> bool:
        """Whether the file or a certificate is another than at the last :meth:`read`."""
        return any(_state(path) != state for path, state in self._seen.items())

    def read(self) -> WebConfiguration:
        """Raises :class:`WebConfigurationError`."""
        named = self._settings.web_config_file
        self._seen = {named: _state(named)} if named is not None else {}
        try:
            content, directory = self._content()
            tls = content.tls_server_config
            for file in (tls.cert_file, tls.key_file, tls.client_ca_file):
                if file:
                    self._seen[directory / file] = _state(directory / file)
            return _configuration(content, directory)
        except (OSError, ValueError) as error:
            where = named or f"{PREFIX}TLS_CERT_FILE, _TLS_KEY_FILE and _TLS_CLIENT_CA_FILE"
            raise WebConfigurationError(f"{where} cannot be used: {error}.") from error

    def _content(self) -> tuple[_File, Path]:
        settings = self._settings
        shorthand = (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
        if settings.web_config_file is None:
            cert, key, client_ca = (str(file or "") for file in shorthand)
            if bool(cert) != bool(key) or (client_ca and not cert):
                raise ValueError(
                    "HTTPS needs a certificate and its key, and asks for certificates of clients "
                    "only with them"
                )
            verify = "RequireAndVerifyClientCert" if client_ca else ""
            tls = _Tls(
                cert_file=cert, key_file=key, client_ca_file=client_ca, client_auth_type=verify
            )
            return _File(tls_server_config=tls), Path()
        if any(shorthand):
            raise ValueError(
                f"{PREFIX}TLS_* are a shorthand for such a file and cannot be set beside it"
            )
        path = settings.web_config_file
        return parse(_read(path)), path.parent


def _read(path: Path) -> bytes:
    # Kubernetes has secrets behind links. `Path.resolve` raises where they lead in a circle.
    return read_file(Path(os.path.realpath(path)), _LIMIT)


def _state(path: Path) -> object:
    """Of what a path leads to."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        return str(error)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Loader(yaml.BaseLoader):
    """Every scalar is text, as it stands in the file: which of it is a number is for the fields to
    say. A key that comes twice is an error, as it is to Prometheus."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is no text", key_node.start_mark
                )
            if key in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` comes twice", key_node.start_mark
                )
            found[key] = self.construct_object(value_node, deep=True)
        return found


def parse(content: bytes) -> _File:
    """A web configuration file. Raises ``ValueError`` with what is wrong."""
    try:
        loaded = yaml.load(content, _Loader)  # noqa: S506 (it constructs text alone)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError("it is no web configuration: it is nested too deeply") from None
    if loaded in (None, ""):
        loaded = {}
    if isinstance(loaded, dict):
        # As Prometheus reads them, a section or a value that was left blank is none. A user
        # without a hash is an error.
        loaded = {
            name: _without_blanks(section) if name != "basic_auth_users" else section
            for name, section in _without_blanks(loaded).items()
        }
    try:
        return msgspec.convert(loaded, _File, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(str(error).replace("`$.", "`").replace(" - at `$`", "")) from error
    except RecursionError:
        raise ValueError("it is no web configuration: it is nested too deeply") from None


def _without_blanks(section: object) -> Any:
    if isinstance(section, dict):
        return {key: value for key, value in section.items() if value != ""}
    return section


def _configuration(content: _File, directory: Path) -> WebConfiguration:
    headers = {name: value for name, value in content.http_server_config.headers.items() if value}
    for name, value in headers.items():
        _check(name in _HEADERS, f"the header {name!r} cannot be set, only", _HEADERS)
        accepted = _HEADERS[name]
        _check(not accepted or value in accepted, f"{name} is none of", accepted)
        if not re.fullmatch(r"[\x20-\x7e]*", value):
            raise ValueError(f"the value of {name} cannot be sent in a header")
    for user, password in content.basic_auth_users.items():
        if not _BCRYPT.fullmatch(password):
            raise ValueError(
                f"what is there for the user {user!r} is no bcrypt hash (`htpasswd -nBC 10 USER` "
                "makes one)"
            )
    limit = content.rate_limit
    interval = _seconds(limit.interval)
    if interval and limit.burst < 1:
        raise ValueError("`rate_limit` admits nothing with a `burst` below 1")
    tls = content.tls_server_config
    return WebConfiguration(
        tls=_context(tls, directory) if _asks_for_tls(tls) else None,
        allowed_sans=frozenset(tls.client_allowed_sans),
        headers=headers,
        users=content.basic_auth_users,
        interval=interval,
        burst=limit.burst,
    )


def _asks_for_tls(tls: _Tls) -> bool:
    return any(
        (
            *(tls.cert, tls.cert_file, tls.key, tls.key_file),
            *(tls.client_ca, tls.client_ca_file, tls.client_auth_type),
        )
    )


def _context(tls: _Tls, directory: Path) -> ssl.SSLContext:
    """Raises ``OSError`` (``ssl.SSLError`` is one), ``ValueError``."""
    _exactly_one(cert=tls.cert, cert_file=tls.cert_file)
    _exactly_one(key=tls.key, key_file=tls.key_file)
    if tls.client_auth_type in {"RequestClientCert", "RequireAnyClientCert", "RequireClientCert"}:
        raise ValueError(
            f"with `client_auth_type` {tls.client_auth_type} nobody would verify a client's "
            "certificate: set RequireAndVerifyClientCert"
        )
    _check(tls.client_auth_type in _VERIFYING, "`client_auth_type` is none of", _VERIFYING)
    verify = _VERIFYING[tls.client_auth_type]
    authority = tls.client_ca or tls.client_ca_file
    if verify != ssl.CERT_NONE and not authority:
        raise ValueError(f"`client_auth_type` {tls.client_auth_type} needs a `client_ca_file`")
    if verify == ssl.CERT_NONE and authority:
        raise ValueError("a client CA is set and no `client_auth_type` that would ask for it")
    if tls.client_allowed_sans and verify != ssl.CERT_REQUIRED:
        raise ValueError("`client_allowed_sans` needs client_auth_type RequireAndVerifyClientCert")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with (
        _readable(tls.cert, directory / tls.cert_file) as cert,
        _readable(tls.key, directory / tls.key_file) as key,
    ):
        try:
            # A key that needs a password would ask a terminal for it.
            context.load_cert_chain(cert, key, password="")
        except ssl.SSLError as error:
            raise ValueError(f"the certificate and its key are no such pair ({error})") from error
    if authority:
        with _readable(tls.client_ca, directory / tls.client_ca_file) as client_ca:
            try:
                context.load_verify_locations(client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"the client CA is no certificate ({error})") from error
    context.verify_mode = verify
    minimum, maximum = _VERSIONS[tls.min_version], _VERSIONS[tls.max_version]
    if minimum > maximum:
        raise ValueError("`min_version` is above `max_version`")
    names = dict.fromkeys(tls.cipher_suites)
    for name in names:
        _check(
            name in _SUITES or name in _SUITES_OF_TLS13,
            f"the cipher suite {name!r} is none of",
            (*_SUITES, *_SUITES_OF_TLS13),
        )
    chosen = [_SUITES[name] for name in names if name in _SUITES]
    if chosen:
        context.set_ciphers(":".join(chosen))
    elif names:
        minimum = ssl.TLSVersion.TLSv1_3
        if maximum < minimum:
            raise ValueError("no suite of `cipher_suites` belongs to `max_version`")
    context.minimum_version, context.maximum_version = minimum, maximum
    if tls.prefer_server_cipher_suites:
        context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    else:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if tls.curve_preferences:
        if len(tls.curve_preferences) > 1:
            raise ValueError("`curve_preferences` can have one curve, or none for OpenSSL's order")
        (curve,) = tls.curve_preferences
        _check(curve in _CURVES, f"the curve {curve!r} is none of", _CURVES)
        context.set_ecdh_curve(_CURVES[curve])
    return context


def _exactly_one(**fields: str) -> None:
    given = [name for name, value in fields.items() if value]
    if len(given) != 1:
        both = " and ".join(f"`{name}`" for name in fields)
        raise ValueError(f"HTTPS needs one of {both}, and {len(given) or 'none'} is set")


@contextmanager
def _readable(text: str, path: Path) -> Iterator[str]:
    """A path from which ``ssl``, which takes nothing else, reads the text or the file's content.
    Whatever the file is, that waits for nobody."""
    content = text.encode() if text else _read(path)
    descriptor = os.memfd_create("pem")
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _check(holds: bool, complaint: str, choices: Iterable[str]) -> None:
    if not holds:
        raise ValueError(f"{complaint} {', '.join(filter(None, choices))}")


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ValueError(f"`interval` {text!r} is no duration such as 1s or 500ms")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
