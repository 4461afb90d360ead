# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is noted beside a rank of its spans: the tables that the collector has, and what is counted.

It outlives this process, so a table is not sent again by the next.
"""

from __future__ import annotations

import msgspec

from sglang_weight_exporter.export.otlp.spans import SentTable
from sglang_weight_exporter.records.base import Record
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.reader import RankDirectory

_FILE = "exported"


class _Exported(Record, frozen=True, kw_only=True):
    """The file ``exported`` in a rank's directory."""

    #: What the tables hold for: another collector, or another name filter, has none of them.
    destination: str = ""
    #: How many dropped events of the rank are counted already, here or before a restart.
    dropped: int = 0
    #: By role.
    tables: dict[str, SentTable] = msgspec.field(default_factory=dict)


class ExportNotes:
    """Reads and writes them; what cannot be read is as if it was never written.

    ``destination``: who has the tables, and what of them.
    """

    def __init__(self, destination: str) -> None:
        self._destination = destination

    def dropped(self, directory: RankDirectory) -> int:
        return self._read(directory).dropped

    def note_dropped(self, directory: RankDirectory, dropped: int) -> None:
        self._write(directory, msgspec.structs.replace(self._read(directory), dropped=dropped))

    def tables(self, directory: RankDirectory) -> dict[str, SentTable]:
        exported = self._read(directory)
        return exported.tables if exported.destination == self._destination else {}

    def note_table(self, directory: RankDirectory, role: str, sent: SentTable) -> None:
        tables = {**self.tables(directory), role: sent}
        dropped = self.dropped(directory)
        self._write(
            directory, _Exported(destination=self._destination, dropped=dropped, tables=tables)
        )

    def _read(self, directory: RankDirectory) -> _Exported:
        try:
            return directory.noted(_FILE, _Exported)
        except (OSError, UnreadableError):
            return _Exported()

    def _write(self, directory: RankDirectory, exported: _Exported) -> None:
        try:
            directory.note(_FILE, msgspec.json.encode(exported))
        except OSError:
            return  # A full disk: the next span carries the table again.
