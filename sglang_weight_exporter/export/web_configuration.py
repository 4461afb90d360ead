# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Who may reach the endpoint, and how: the web configuration file that Prometheus and its exporters
share (prometheus/exporter-toolkit, docs/web-configuration.md).

Where this differs: a file that cannot be used changes nothing while one that could is in force, and
neither does one that would open what is closed now; HTTP/1.1 is spoken whatever ``http2`` says; and
what is not supported is refused in words: an empty file, certificates of clients that nobody
verifies, cipher suites, curves, and certificates inside the file.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from sglang_weight_exporter.settings import PREFIX, Settings
from sglang_weight_exporter.store.files import read_file

#: A web configuration and a certificate take some kilobytes.
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
    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    client_auth_type: str = ""
    client_allowed_sans: tuple[str, ...] = ()
    min_version: _TlsVersion = "TLS12"
    max_version: _TlsVersion = "TLS13"
    #: What Prometheus has besides, so that it is refused by what it is.
    cert: str = ""
    key: str = ""
    client_ca: str = ""
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

    def opens(self, other: WebConfiguration) -> str:
        """What keeps strangers out now and would not with the other one; empty: nothing."""
        kept = (
            ("TLS", self.tls, other.tls),
            ("the certificates of clients", _asks_clients(self.tls), _asks_clients(other.tls)),
            ("`client_allowed_sans`", self.allowed_sans, other.allowed_sans),
            ("`basic_auth_users`", self.users, other.users),
        )
        return next((name for name, now, then in kept if now and not then), "")


def _asks_clients(tls: ssl.SSLContext | None) -> bool:
    return tls is not None and tls.verify_mode == ssl.CERT_REQUIRED


class WebConfigurationSource:
    """The file that a setting names.

    ``environ``: where settings of a former release may be left, which are refused rather than
    ignored: somebody believes that the endpoint is closed.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self._path = settings.web_config_file
        self._former = sorted(
            name
            for name in (f"{PREFIX}TLS_{each}_FILE" for each in ("CERT", "KEY", "CLIENT_CA"))
            if environ.get(name)
        )
        #: What was read, and its state before that: what changes meanwhile is read again.
        self._seen: dict[Path, object] = {}

    def has_changed(self) -> bool:
        """Whether the file or a certificate is another than at the last :meth:`read`."""
        return any(_state(path) != state for path, state in self._seen.items())

    def read(self) -> WebConfiguration:
        """Raises :class:`WebConfigurationError`."""
        if self._former:
            raise WebConfigurationError(
                f"{self._former[0]} is no longer read. Write `tls_server_config` into a web "
                f"configuration file, name that in {PREFIX}WEB_CONFIG_FILE, and unset this."
            )
        path = self._path
        if path is None:
            return WebConfiguration()
        self._seen = {path: _state(path)}
        try:
            content, directory = parse(_read(path)), path.parent
            tls = content.tls_server_config
            for file in (tls.cert_file, tls.key_file, tls.client_ca_file):
                if file:
                    self._seen[directory / file] = _state(directory / file)
            return _configuration(content, directory)
        except (OSError, ValueError) as error:
            raise WebConfigurationError(f"{path} cannot be used: {error}.") from error


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


def _load(content: bytes) -> Any:
    """Every scalar is text, as it stands in the file: which of it is a number is for the fields to
    say. A key that comes twice is an error, as it is to Prometheus. Raises ``ValueError``."""
    try:
        import bcrypt  # noqa: F401 (what a user's password is checked with, later)
        import yaml
    except ImportError as error:
        raise ValueError(
            f"it takes {error.name}, which is not installed here (pip install "
            "'sglang-weight-exporter[web]')"
        ) from error

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            text = isinstance(key, str)
            if not text or key in found:
                problem = f"the key `{key}` comes twice" if text else "a key is no text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    class Loader(yaml.BaseLoader):
        construct_mapping = mapping

    try:
        return yaml.load(content, Loader)  # noqa: S506 (it constructs text alone)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from error


def parse(content: bytes) -> _File:
    """A web configuration file. Raises ``ValueError`` with what is wrong."""
    try:
        loaded = _load(content)
        if loaded in (None, ""):
            raise ValueError("it is empty, as after a full disk; write `{}` to ask for nothing")
        if isinstance(loaded, dict):
            # As Prometheus reads them, a section or a value that was left blank is none. A user
            # without a hash is an error.
            loaded = {
                name: _without_blanks(section) if name != "basic_auth_users" else section
                for name, section in _without_blanks(loaded).items()
            }
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
    _refuse(tls)
    return WebConfiguration(
        tls=_context(tls, directory) if _asks_for_tls(tls) else None,
        allowed_sans=frozenset(tls.client_allowed_sans),
        headers=headers,
        users=content.basic_auth_users,
        interval=interval,
        burst=limit.burst,
    )


def _asks_for_tls(tls: _Tls) -> bool:
    return any((tls.cert_file, tls.key_file, tls.client_ca_file, tls.client_auth_type))


def _refuse(tls: _Tls) -> None:
    """What is not supported. Raises ``ValueError``."""
    for name, value in (("cert", tls.cert), ("key", tls.key), ("client_ca", tls.client_ca)):
        if value:
            raise ValueError(
                f"`{name}` is not supported: write it into a file and name that in `{name}_file`"
            )
    for name in ("cipher_suites", "curve_preferences"):
        if getattr(tls, name):
            raise ValueError(
                f"`{name}` is not supported: OpenSSL's defaults are offered, which `min_version` "
                "TLS13 narrows"
            )
    if not tls.prefer_server_cipher_suites:
        raise ValueError("`prefer_server_cipher_suites` cannot be false: the server's order counts")
    if tls.client_auth_type in {"RequestClientCert", "RequireAnyClientCert", "RequireClientCert"}:
        raise ValueError(
            f"with `client_auth_type` {tls.client_auth_type} nobody would verify a client's "
            "certificate: set RequireAndVerifyClientCert"
        )


def _context(tls: _Tls, directory: Path) -> ssl.SSLContext:
    """Raises ``OSError`` (``ssl.SSLError`` is one), ``ValueError``."""
    for name, file in (("cert_file", tls.cert_file), ("key_file", tls.key_file)):
        if not file:
            raise ValueError(f"HTTPS needs `{name}`, which is not set")
    _check(tls.client_auth_type in _VERIFYING, "`client_auth_type` is none of", _VERIFYING)
    verify = _VERIFYING[tls.client_auth_type]
    if verify != ssl.CERT_NONE and not tls.client_ca_file:
        raise ValueError(f"`client_auth_type` {tls.client_auth_type} needs a `client_ca_file`")
    if verify == ssl.CERT_NONE and tls.client_ca_file:
        raise ValueError("a client CA is set and no `client_auth_type` that would ask for it")
    if tls.client_allowed_sans and verify != ssl.CERT_REQUIRED:
        raise ValueError("`client_allowed_sans` needs client_auth_type RequireAndVerifyClientCert")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _readable(directory / tls.cert_file) as cert, _readable(directory / tls.key_file) as key:
        try:
            # A key that needs a password would ask a terminal for it.
            context.load_cert_chain(cert, key, password="")
        except ssl.SSLError as error:
            raise ValueError(f"the certificate and its key are no such pair ({error})") from error
    if tls.client_ca_file:
        with _readable(directory / tls.client_ca_file) as client_ca:
            try:
                context.load_verify_locations(client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"the client CA is no certificate ({error})") from error
    context.verify_mode = verify
    minimum, maximum = _VERSIONS[tls.min_version], _VERSIONS[tls.max_version]
    if minimum > maximum:
        raise ValueError("`min_version` is above `max_version`")
    context.minimum_version, context.maximum_version = minimum, maximum
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    return context


@contextmanager
def _readable(path: Path) -> Iterator[str]:
    """A path from which ``ssl``, which takes nothing else, reads the file's content. Whatever the
    file is, that waits for nobody."""
    content = _read(path)
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
