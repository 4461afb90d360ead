# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A pointer table in the forms that programs take. Each function returns the whole output.

Columns are called the same in every form, and pointers are hexadecimal strings: not every reader
of JSON or CSV keeps an integer above 2^53. The exceptions are the forms that a transfer engine
takes as they are (``mooncake``, ``nixl``, ``sglang-remote``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from sglang_weight_exporter.store.tables import Table
from sglang_weight_exporter.weight_table import Region, Row


class MissingLibraryError(Exception):
    """A format needs a library that is not installed; the message names it."""


def _columns(record: Row | Region) -> dict[str, Any]:
    values = record._asdict()
    for pointer in ("data_ptr", "storage_ptr"):
        if pointer in values:
            values[pointer] = hex(values[pointer])
    return values


def identity(table: Table) -> dict[str, Any]:
    """Whose table it is, under the names of the metrics' labels where they have one."""
    return {
        "engine": table.engine.name,
        "model_name": table.engine.model_name,
        "role": table.role.name,
        **table.ranks.labels,
        "device": table.role.device,
        "pid": table.pid,
        "rank_id": table.rank_id,
        "weight_version": table.weight_version,
        "update": table.update,
        "released": table.released,
        "captured_at": table.columns.captured_at,
        "sha256": table.columns.sha256,
    }


def as_json(tables: Sequence[tuple[Table, Sequence[Row]]]) -> bytes:
    """``{"tables": [{identity, "tensors": [row, …], "regions": [region, …]}, …]}``"""
    document = {
        "tables": [
            {
                **identity(table),
                "tensors": [_columns(row) for row in rows],
                "regions": [_columns(region) for region in table.regions()],
            }
            for table, rows in tables
        ]
    }
    return msgspec.json.encode(document) + b"\n"


def as_jsonl(records: Sequence[Row | Region]) -> bytes:
    """One object a line."""
    encode = msgspec.json.Encoder().encode_lines
    return encode([_columns(record) for record in records])


def as_csv(records: Sequence[Row | Region]) -> bytes:
    """RFC 4180 with a header; ``shape`` and ``stride`` as JSON arrays."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for index, record in enumerate(records):
        values = _columns(record)
        if index == 0:
            writer.writerow(values)
        writer.writerow(
            str(list(value)) if isinstance(value, tuple) else value for value in values.values()
        )
    return text.getvalue().encode()


def as_parquet(records: Sequence[Row | Region]) -> bytes:
    """Apache Parquet with dictionary-coded texts. Needs pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingLibraryError(
            "Parquet needs pyarrow, which is not installed here. Install it "
            "(`pip install pyarrow`), or take another format."
        ) from error
    text = pa.dictionary(pa.int32(), pa.string())
    types = {
        "name": pa.string(),
        "data_ptr": pa.string(),
        "nbytes": pa.int64(),
        "dtype": text,
        "shape": pa.list_(pa.int64()),
        "stride": pa.list_(pa.int64()),
        "device": text,
        "kind": text,
        "storage_ptr": pa.string(),
        "storage_nbytes": pa.int64(),
    }
    rows = [_columns(record) for record in records]
    fields = rows[0].keys() if rows else types.keys()
    arrays = {name: pa.array([row[name] for row in rows], type=types[name]) for name in fields}
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd")
    return sink.getvalue()


def as_mooncake(regions: Iterable[Region]) -> bytes:
    """The two lists that Mooncake's ``TransferEngine.batch_register_memory(addrs, lens)`` takes."""
    addresses, lengths = [], []
    for region in regions:
        addresses.append(region.data_ptr)
        lengths.append(region.nbytes)
    return msgspec.json.encode({"addrs": addresses, "lens": lengths}) + b"\n"


def as_nixl(regions: Iterable[Region]) -> bytes:
    """Memory type → the 4-tuples ``(addr, len, dev_id, meta)`` that NIXL's
    ``register_memory(descs, mem_type)`` takes (as arrays: JSON has no tuples)."""
    descriptors: dict[str, list[tuple[int, int, int, str]]] = {}
    for region in regions:
        kind, _, index = region.device.partition(":")
        memory = "DRAM" if kind == "cpu" else "VRAM"
        descriptors.setdefault(memory, []).append(
            (region.data_ptr, region.nbytes, int(index or 0), "")
        )
    return msgspec.json.encode(descriptors) + b"\n"


def as_sglang_remote(rows: Iterable[Row]) -> bytes:
    """``{name: [data_ptr, numel, element_size]}`` of parameters, as SGLang's remote-instance
    loader exchanges it (``remote_instance_weight_loader_utils.register_memory_region``)."""
    weights: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        if row.kind == "parameter":
            numel = 1
            for size in row.shape:
                numel *= size
            weights[row.name] = (row.data_ptr, numel, row.nbytes // numel if numel else 0)
    return msgspec.json.encode(weights) + b"\n"


#: Forms of rows or, with ``--regions``, of regions.
OF_RECORDS: dict[str, Callable[[Any], bytes]] = {
    "jsonl": as_jsonl,
    "csv": as_csv,
    "parquet": as_parquet,
}
#: Forms that a transfer engine takes to register memory.
OF_REGIONS: dict[str, Callable[[Iterable[Region]], bytes]] = {
    "mooncake": as_mooncake,
    "nixl": as_nixl,
}
#: Forms of rows alone.
OF_ROWS: dict[str, Callable[[Iterable[Row]], bytes]] = {"sglang-remote": as_sglang_remote}
FORMATS = ("text", "json", *OF_RECORDS, *OF_REGIONS, *OF_ROWS)
