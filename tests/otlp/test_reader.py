# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`table --from-trace`: the table comes back whole, or the message says what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from collectors import Backend, attributes_of
from ranks import ExporterProcess, Rank, rows
from waiting import LIMIT, eventually

from sglang_weight_exporter.weight_table import table_of_rows

StartExporter = Callable[..., ExporterProcess]


def table(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", "table", "--from-trace", file, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.fixture
def document(
    rank: Rank, backend: Backend, start_exporter: StartExporter, tmp_path: Path
) -> dict[str, Any]:
    """A request with the span of a load of 5,000 tensors, as a collector writes it."""
    rank.load(rows(5_000))
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: not rank.waiting(), what="acknowledged")
    file = backend.write_json(tmp_path / "trace.json")
    request: dict[str, Any] = json.loads(file.read_text())
    return request


def span_of(document: dict[str, Any]) -> dict[str, Any]:
    span: dict[str, Any] = document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    return span


def written(tmp_path: Path, document: Any) -> Path:
    file = tmp_path / "changed.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def attribute(event: dict[str, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in event["attributes"] if each["key"] == key)
    return found


def as_rows(output: str) -> list[tuple[str, int, int]]:
    """Name, address and bytes of each line of --format jsonl."""
    lines = [json.loads(line) for line in output.splitlines()]
    return [(line["name"], int(line["data_ptr"], 16), line["nbytes"]) for line in lines]


EXPECTED = [(row.name, row.data_ptr, row.nbytes) for row in rows(5_000)]


def test_the_file_of_a_collector(document: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, "\n".join([json.dumps({"resourceLogs": []}), json.dumps(document)]))
    answer = table(file, "--format", "jsonl")
    assert answer.returncode == 0, answer.stderr
    assert as_rows(answer.stdout) == EXPECTED


def test_what_tensors_hold_is_of_the_span_or_of_none(
    rank: Rank, backend: Backend, start_exporter: StartExporter, tmp_path: Path
) -> None:
    """An update in place refers to the rows of an earlier span, and holds something else."""
    plain = table_of_rows(rows(5_000), role="target", captured_at=1.0)
    held = [
        msgspec.structs.replace(
            plain,
            fingerprints=b"".join((number + row).to_bytes(16, "big") for row in range(5_000)),
            fingerprint=f"{number:032x}",
        )
        for number in (1, 2)
    ]
    first = rank.update_to(held[0])
    start_exporter(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{backend.grpc_port}")
    eventually(lambda: len(backend.spans()) == 1, what="the load has arrived")
    rank.update_to(held[1])
    eventually(lambda: len(backend.spans()) == 2, what="the update has arrived")
    file = backend.write_json(tmp_path / "trace.json")
    answer = table(file, "--fingerprints", "--trace-id", first.update.trace_id)
    assert answer.returncode == 0, answer.stderr
    head, *lines = answer.stdout.splitlines()
    assert head.endswith(f"fingerprint {1:032x}")
    expected = [f"{1 + number:032x} {row.name}" for number, row in enumerate(rows(5_000))]
    assert lines == expected
    newest = table(file, "--fingerprints")
    assert newest.returncode == 2
    assert "has no fingerprints" in newest.stderr
    assert as_rows(table(file, "--format", "jsonl").stdout) == EXPECTED
    spans = [attributes_of(span) for span in backend.spans()]
    assert [span["sglang.weights.fingerprint"] for span in spans] == [f"{1:032x}", f"{2:032x}"]


def test_the_answer_of_tempo(document: dict[str, Any], tmp_path: Path) -> None:
    """Tempo cannot be installed here: this is the form that its documentation gives."""
    file = written(tmp_path, {"batches": document["resourceSpans"]})
    assert as_rows(table(file, "--format", "jsonl").stdout) == EXPECTED


def test_the_answer_of_jaeger(document: dict[str, Any], tmp_path: Path) -> None:
    """Jaeger cannot be installed here: this is the form of its API, where arrays are JSON texts."""

    def plain(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "arrayValue":
            return json.dumps([plain(each) for each in content["values"]])
        return int(content) if kind == "intValue" else content

    def tags(attributes: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"key": each["key"], "value": plain(each["value"])} for each in attributes]

    span = span_of(document)
    resource = document["resourceSpans"][0]["resource"]["attributes"]
    answer = {
        "traceID": "1",
        "spans": [
            {
                "traceID": "ab" * 16,
                "spanID": "cd" * 8,
                "operationName": span["name"],
                "processID": "p1",
                "tags": tags(span["attributes"]),
                "logs": [
                    {
                        "timestamp": 1,
                        "fields": [
                            {"key": "event", "value": event["name"]},
                            *tags(event["attributes"]),
                        ],
                    }
                    for event in span["events"]
                ],
            }
        ],
        "processes": {"p1": {"serviceName": "sglang", "tags": tags(resource)}},
    }
    file = written(tmp_path, {"data": [answer]})
    assert as_rows(table(file, "--format", "jsonl").stdout) == EXPECTED


def test_the_answer_of_phoenix(document: dict[str, Any], tmp_path: Path) -> None:
    """As Phoenix answered when it was tried: attributes as an object, and no resource."""

    def plain(value: dict[str, Any]) -> Any:
        ((kind, content),) = value.items()
        if kind == "arrayValue":
            return [plain(each) for each in content["values"]]
        return int(content) if kind == "intValue" else content

    def members(attributes: list[dict[str, Any]]) -> dict[str, Any]:
        return {each["key"]: plain(each["value"]) for each in attributes}

    span = span_of(document)
    answer = {
        "id": "U3Bhbjo4",
        "name": span["name"],
        "context": {"trace_id": "ab" * 16, "span_id": "cd" * 8},
        "parent_id": None,
        "attributes": members(span["attributes"]),
        "events": [
            {"name": event["name"], "attributes": members(event["attributes"])}
            for event in span["events"]
        ],
    }
    file = written(tmp_path, {"data": [answer], "next_cursor": None})
    assert as_rows(table(file, "--format", "jsonl").stdout) == EXPECTED
    assert table(file, "--trace-id", "cd" * 16).returncode == 2


def test_a_chunk_that_is_missing_is_named(document: dict[str, Any], tmp_path: Path) -> None:
    del span_of(document)["events"][1]
    answer = table(written(tmp_path, document))
    assert answer.returncode == 2
    assert "rows 2,000 to 3,999 are missing" in answer.stderr
    assert "of which 2 are here" in answer.stderr


def test_a_column_that_was_cut_is_named(document: dict[str, Any], tmp_path: Path) -> None:
    column = attribute(span_of(document)["events"][2], "data_ptr")
    del column["value"]["arrayValue"]["values"][400:]
    answer = table(written(tmp_path, document))
    assert answer.returncode == 2
    assert "chunk 2 is damaged (the column data_ptr has 400 of 1000 values)" in answer.stderr


def test_a_column_that_was_dropped_is_named(document: dict[str, Any], tmp_path: Path) -> None:
    event = span_of(document)["events"][0]
    event["attributes"].remove(attribute(event, "name"))
    answer = table(written(tmp_path, document))
    assert "chunk 0 is damaged (the column name is missing)" in answer.stderr


def test_a_value_that_was_changed_does_not_verify(document: dict[str, Any], tmp_path: Path) -> None:
    values = attribute(span_of(document)["events"][0], "nbytes")["value"]["arrayValue"]["values"]
    values[7] = {"intValue": "4097"}
    answer = table(written(tmp_path, document))
    assert answer.returncode == 2
    assert "SHA-256" in answer.stderr
    assert not answer.stdout


def test_a_table_in_another_span_is_asked_for(
    rank: Rank, document: dict[str, Any], backend: Backend, tmp_path: Path
) -> None:
    rank.update()
    eventually(lambda: not rank.waiting(), what="acknowledged")
    both = backend.write_json(tmp_path / "both.json")
    assert as_rows(table(both, "--format", "jsonl").stdout) == EXPECTED

    update = written(tmp_path, both.read_text().splitlines()[1])
    answer = table(update)
    assert answer.returncode == 2
    load = backend.spans()[0]
    assert f"the span {load.span_id.hex()} of the trace {load.trace_id.hex()}" in answer.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not JSON", "is not JSON"),
        ("", "holds no span of a load or an update"),
        ('{"resourceSpans": []}', "holds no span of a load or an update"),
    ],
)
def test_what_is_no_trace(content: str, said: str, tmp_path: Path) -> None:
    answer = table(written(tmp_path, content))
    assert answer.returncode == 2
    assert said in answer.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"resourceSpans": "\xff"}', "no text in UTF-8"),
        (b"[" * 200_000, "nested"),
        (b'{"a":' * 200_000, "nested"),
        (b'{"spanId": "1", "name": "sglang.weights.load", "attributes": 7}', "has no table"),
    ],
)
def test_what_was_damaged_on_the_way(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    answer = table(tmp_path / "trace.json")
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sglang.weights.table.rows", {"stringValue": "many"}),
        ("sglang.weights.table.rows", {"arrayValue": {"values": [{}]}}),
        ("sglang.weights.tp_rank", {"stringValue": "x"}),
        ("sglang.weights.event.number", {"intValue": {}}),
        ("sglang.weights.table.spans", {"doubleValue": 1e400}),
        ("sglang.weights.model_name", {"stringValue": "\ud800"}),
    ],
)
def test_an_attribute_that_was_changed(
    document: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    attribute(span_of(document), key)["value"] = value
    answer = table(written(tmp_path, document))
    assert "Traceback" not in answer.stderr
    assert answer.returncode in {0, 2}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    answer = table(tmp_path / "nowhere.json")
    assert answer.returncode == 2
    assert "nowhere.json" in answer.stderr
    assert "Traceback" not in answer.stderr
