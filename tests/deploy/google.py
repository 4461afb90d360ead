# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What Google's PodMonitoring and Rules may hold, of their definitions in
https://github.com/GoogleCloudPlatform/prometheus-engine (charts/operator/crds, v1)."""

from __future__ import annotations

from typing import Any


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_LABEL = {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}
_METADATA = {"type": "object"}
_SECRET = _object(secret=_object(("key", "name"), key=_TEXT, name=_TEXT, namespace=_TEXT))
_ENDPOINT = _object(
    ("interval", "port"),
    port={"type": ["string", "integer"]},
    path=_TEXT,
    params={"type": "object", "additionalProperties": {"type": "array", "items": _TEXT}},
    scheme={"enum": ["http", "https"]},
    interval=_TEXT,
    timeout=_TEXT,
    tls=_object(ca=_SECRET, cert=_SECRET, key=_SECRET, serverName=_TEXT),
    basicAuth=_object(username=_TEXT, password=_SECRET),
    metricRelabeling={
        "type": "array",
        "items": _object(
            action=_TEXT,
            regex=_TEXT,
            replacement=_TEXT,
            separator=_TEXT,
            sourceLabels={"type": "array", "items": _LABEL},
            targetLabel=_LABEL,
        ),
    },
)
_RULE = _object(
    ("expr",),
    alert=_TEXT,
    record=_TEXT,
    expr=_TEXT,
    labels=_TEXTS,
    annotations=_TEXTS,
    **{"for": _TEXT},
)
_RULES = {"type": "array", "items": _RULE}

SCHEMAS = {
    "PodMonitoring": _object(
        ("spec",),
        apiVersion={"const": "monitoring.googleapis.com/v1"},
        kind=_TEXT,
        metadata=_METADATA,
        spec=_object(
            ("endpoints", "selector"),
            selector=_object(matchLabels=_TEXTS, matchExpressions={"type": "array"}),
            targetLabels=_object(
                fromPod={
                    "type": "array",
                    "items": _object(("from",), **{"from": _TEXT, "to": _LABEL}),
                }
            ),
            limits=_object(samples={"type": "integer"}),
            endpoints={"type": "array", "minItems": 1, "maxItems": 10, "items": _ENDPOINT},
        ),
    ),
    "Rules": _object(
        ("spec",),
        apiVersion={"const": "monitoring.googleapis.com/v1"},
        kind=_TEXT,
        metadata=_METADATA,
        spec=_object(
            ("groups",),
            groups={
                "type": "array",
                "items": _object(
                    ("interval", "name", "rules"), interval=_TEXT, name=_TEXT, rules=_RULES
                ),
            },
        ),
    ),
}
