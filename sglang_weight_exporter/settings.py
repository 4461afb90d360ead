# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Every setting of our own, in one place: ``SGLANG_WEIGHT_EXPORTER_*``.

The engine process reads them once when SGLang is hooked, the exporter process once when it starts
(where a flag of the same name wins). ``OTEL_*`` variables are OpenTelemetry's and are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

#: In which form OTLP carries the pointer table.
TABLE_FORMS = ("span_events", "logs", "both")

PREFIX = "SGLANG_WEIGHT_EXPORTER_"

#: dcgm-exporter's default too: where both run in one network namespace, one has to move.
DEFAULT_PORT = 9400


#: What can be chosen of the metrics: each of these has all that is in the one before,
METRIC_PRESETS = ("lean", "default", "full")
#: and what is in a group.
METRIC_GROUPS = (
    "core",
    "memory",
    "phases",
    "operations",
    "fingerprints",
    "lora",
    "hooks",
    "process",
)


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(name for name in re.split(r"[,\s]+", text.lower()) if name)
    unknown = [name for name in names if name not in {*METRIC_PRESETS, *METRIC_GROUPS}]
    if unknown or not names:
        raise ValueError(
            f"names {', '.join(unknown) or 'nothing'}; there are {', '.join(METRIC_PRESETS)} and "
            f"{', '.join(METRIC_GROUPS)}"
        )
    return names


def _switch(text: str) -> bool:
    """As SGLang reads its own: 1/true/yes/on and 0/false/no/off, in any case."""
    word = text.lower()
    if word in {"1", "true", "yes", "on", "auto"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError("is neither on nor off")


def _port(text: str) -> int:
    if text.startswith("tcp://"):
        raise ValueError(
            "is what Kubernetes sets for a Service named sglang-weight-exporter; set "
            "enableServiceLinks: false in the pod, or name the Service otherwise"
        )
    port = int(text)
    if not 0 < port < 65536:
        raise ValueError("is not a port between 1 and 65535")
    return port


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError("is not a number of seconds")
    return seconds


def _table(text: str) -> str:
    if text.lower() not in TABLE_FORMS:
        raise ValueError(f"is not one of {', '.join(TABLE_FORMS)}")
    return text.lower()


def _message_bytes(text: str) -> int:
    nbytes = int(text)
    if nbytes < 20_000:
        raise ValueError("is not a number of bytes from 20000 on")
    return nbytes


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _setting(default: Any, parse: Callable[[str], Any], description: str) -> Any:
    return field(default=default, metadata={"parse": parse, "description": description})


@dataclass(frozen=True)
class Settings:
    """The settings in force. Field names are the variables' without the prefix, in lower case."""

    #: ``bootstrap`` acts on it without importing this; here it is documented, and a word that is
    #: neither on nor off is complained about.
    disabled: bool = _setting(
        False, _switch, "switch everything off; read before anything else is imported"
    )
    port: int = _setting(DEFAULT_PORT, _port, "port of the metrics endpoint")
    address: str = _setting("::", str, "address of the metrics endpoint; :: is all of them")
    web_config_file: Path | None = _setting(
        None, _path, "TLS, users, headers and a rate limit, in the format of Prometheus' exporters"
    )
    metrics: tuple[str, ...] = _setting(
        ("default",),
        _metrics,
        "metrics that are served and sent: lean (what the dashboards and rules ask for), default "
        "(and what is seldom there), full, or groups of them, separated by commas",
    )
    serve: bool = _setting(
        True, _switch, "auto: ranks start the exporter process; off: somebody else runs it"
    )
    runtime_dir: Path | None = _setting(
        None, _path, "directory of snapshots, events and locks; of mode 0700 and owned by the user"
    )
    metadata_dir: Path | None = _setting(
        None, _path, "keep weights_metadata files current in this directory"
    )
    reader_wait_seconds: float = _setting(
        0.0, _seconds, "how long an update waits for readers that hold the table"
    )
    fingerprint: bool = _setting(
        False, _switch, "fingerprint all weights after a load and after each update"
    )
    reference_dir: Path | None = _setting(
        None,
        _path,
        "directory, which hosts may share, of what the first load of each checkpoint and "
        "configuration left; later loads are compared with it, where fingerprints are on",
    )
    manifest_dir: Path | None = _setting(
        None,
        _path,
        "directory, which hosts may share, in which a trainer leaves manifest_VERSION.json of what "
        "it sent; each update is compared with its version's, where fingerprints are on",
    )
    table: str = _setting(
        "span_events", _table, "how OTLP carries the pointer table: span_events, logs or both"
    )
    span_table: bool = _setting(True, _switch, "whether spans carry the pointer table")
    span_table_names: str = _setting(
        "", str, "regular expression: of the table, spans carry only the tensors that it finds"
    )
    span_bytes: int = _setting(
        3_000_000, _message_bytes, "the largest span, which is a message of its own"
    )
    span_event_bytes: int = _setting(
        500_000, _message_bytes, "the largest event of a span, which is a part of the table"
    )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
        """The settings in force, and a sentence for each variable that could not be used.

        An unusable value never stops anything: the default takes its place.
        """
        settings, complaints = cls(), []
        for setting in fields(cls):
            variable = PREFIX + setting.name.upper()
            text = environ.get(variable, "").strip()
            if not text:
                continue
            try:
                settings = replace(settings, **{setting.name: setting.metadata["parse"](text)})
            except ValueError as error:
                complaints.append(
                    f"{variable}={text!r} cannot be used ({error}); "
                    f"the default, {setting.default!r}, is used instead."
                )
        return settings, complaints
