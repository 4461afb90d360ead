# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting events → the collector. An event's file goes once the collector has acknowledged it.

The store is the queue, so what waits outlives this process and the engine. A rank bounds its own
queue (``store.rank``); what dead ranks left is bounded here. Whatever is given up is counted.
"""

from __future__ import annotations

import logging
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from sglang_weight_exporter.export.otlp.client import ExportResult, OtlpClient
from sglang_weight_exporter.export.otlp.spans import (
    EventSpans,
    SentTable,
    event_spans,
    selected,
)
from sglang_weight_exporter.export.views import SpanCounts
from sglang_weight_exporter.records.base import Record
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.reader import RankDirectory, rank_directories
from sglang_weight_exporter.store.runtime_dir import RuntimeDir
from sglang_weight_exporter.store.spool import EVENT_BYTES
from sglang_weight_exporter.weight_table import WeightTable

logger = logging.getLogger("sglang_weight_exporter")

#: Between two looks at the store.
LOOK_SECONDS = 1.0

#: Between two tries at a collector that does not answer: from, to, each twice the one before.
#: The exporter's own retries (``OTEL_EXPORTER_OTLP_TIMEOUT``) come on top.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

#: How often the oldest event may fail before others are tried first, how many may fail at a time,
#: and how often one may fail while others are taken before it is given up.
PATIENCE = 3
FAILURES = 3
REFUSALS = 5

#: What dead ranks may leave, all together, before the oldest of them is given up.
DEAD_BYTES = 4 * EVENT_BYTES


class _Exported(Record, frozen=True, kw_only=True):
    """The file ``exported`` in a rank's directory: which tables the collector has, by role, and
    what is counted."""

    #: What the tables hold for: another collector, or another name filter, has none of them.
    destination: str = ""
    #: How many dropped events of the rank are counted already, here or before a restart.
    dropped: int = 0
    tables: dict[str, SentTable] = msgspec.field(default_factory=dict)


class SpanSender:
    """Sends the events of all ranks, dead ones included, from a thread of its own."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        collector: OtlpClient,
        counts: SpanCounts,
        *,
        table: bool = True,
        names: re.Pattern[str] | None = None,
        dead_bytes: int = DEAD_BYTES,
    ) -> None:
        self._runtime_dir = runtime_dir
        self._collector = collector
        self._counts = counts
        self._table = table
        self._names = names
        self._dead_bytes = dead_bytes
        self._destination = f"{collector.destination}|{names.pattern if names else ''}"
        self._failures: Counter[Path] = Counter()
        self._refusals: Counter[Path] = Counter()
        #: Taken or given up, and not yet removed: a directory may have become read-only.
        self._done: set[Path] = set()
        #: Rank → the version of its snapshot whose dropped events are counted.
        self._counted: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="sglang-weight-exporter-spans", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Send what waits if the collector answers, for at most this long."""
        self._stop.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        pause = 0.0
        while True:
            stopping = self._stop.wait(pause or LOOK_SECONDS)
            if stopping and pause:
                return  # The collector does not answer; what waits is kept.
            try:
                delivered = self.deliver()
            except OSError as error:
                logger.warning("Waiting spans cannot be looked at now (%s).", error)
                delivered = False
            except Exception:
                logger.exception("Spans could not be sent because of an error in the exporter.")
                delivered = False
            if stopping:
                return
            if delivered:
                pause = 0.0
            else:
                pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                pause *= random.uniform(0.8, 1.0)  # noqa: S311
            pause = max(pause, self._collector.wait_seconds)

    def deliver(self) -> bool:
        """Send all that waits, oldest first. False if the collector took nothing of it.

        When the first one keeps failing, another is tried before it: if the collector takes that,
        it refuses the first for what it is, which must not keep the others waiting.
        """
        self._bound_dead()
        waiting = list(self._waiting())
        self._counts.waiting = len(waiting)
        paths = {path for _, path in waiting}
        self._done &= paths
        for counts in (self._failures, self._refusals):
            for path in counts.keys() - paths:
                del counts[path]
        if len(waiting) > 1 and self._failures[waiting[0][1]] >= PATIENCE:
            other = min(waiting[1:], key=lambda entry: self._failures[entry[1]])
            waiting.remove(other)
            waiting.insert(0, other)
        accepted = failed = unreadable = 0
        for directory, path in waiting:
            try:
                refused = self._send(directory, path)
            except OSError as error:
                # Such as too many open files: perhaps it can be read next time.
                if not self._failures[path]:
                    logger.warning(
                        "%s cannot be read or removed now (%s). It is tried again.", path, error
                    )
                self._failures[path] += 1
                unreadable += 1
                continue
            if refused is None:
                accepted += 1
                self._counts.waiting -= 1
                continue
            failed += 1
            self._failures[path] += 1
            if self._collector.wait_seconds:
                break  # It has too much to do, whatever it is sent.
            if accepted:
                self._refuse(path, refused)
            if not accepted or failed == FAILURES:
                break
        return accepted > 0 or not (failed or unreadable)

    def _refuse(self, path: Path, refused: ExportResult) -> None:
        self._refusals[path] += 1
        if self._refusals[path] >= REFUSALS:
            self._give_up(
                path,
                "refused",
                f"The collector at {self._collector.destination} refused {path.name} {REFUSALS} "
                f"times and took others ({refused.reason}), so it is given up.",
            )

    def _waiting(self) -> Iterator[tuple[RankDirectory, Path]]:
        for directory in rank_directories(self._runtime_dir):
            self._count_dropped(directory)
            for path in directory.events.waiting():
                yield directory, path

    def _send(self, directory: RankDirectory, path: Path) -> ExportResult | None:
        """``None`` when nothing of this event has to wait any more, else why the collector did
        not take it. Raises ``OSError`` when it cannot be read or removed now."""
        try:
            if path in self._done:
                path.unlink(missing_ok=True)
                return None
            event = directory.events.event(path)
        except FileNotFoundError:
            return None  # The rank has dropped it in this moment, and counts it.
        except UnreadableError as error:
            self._give_up(path, "unreadable", str(error))
            return None
        try:
            built = self._spans(directory, event)
            requests = [encode_spans([span]) for span in built.spans]
        except OSError:
            raise
        except Exception as error:
            # It is for its rank alone, and once: the events of all others wait behind it.
            self._give_up(
                path,
                "unreadable",
                f"No span can be made of {path} ({type(error).__name__}: {error}), so it is given "
                "up. Its load or update is missing among the spans.",
            )
            return None
        rejected = 0
        for request in requests:
            answer = self._collector.take(request)
            if not answer.taken:
                self._counts.failures += 1
                return answer
            rejected += min(answer.rejected, 1)
        self._counts.exported += len(requests) - rejected
        if rejected:
            # OTLP forbids to send it again.
            self._counts.dropped["refused"] += 1
        self._done.add(path)
        # In this order: killed between the two, the table is sent once more and never taken for
        # sent when it is not.
        path.unlink(missing_ok=True)
        if built.sent is not None and not rejected:
            self._remember(directory, event.role, built.sent)
        return None

    def _spans(self, directory: RankDirectory, event: Event) -> EventSpans:
        if not self._table:
            return event_spans(event, None, state="disabled")
        if event.table is None:
            return event_spans(event, None, state="missing")
        sent = self._remembered(directory).get(event.role)
        if sent is not None and sent.sha256 == event.table.sha256:
            return event_spans(event, None, state="unchanged", unchanged_since=sent)
        table = self._read_table(directory, event)
        if table is None:
            return event_spans(event, None, state="missing")
        if self._names is not None:
            table = selected(table, self._names)
        return event_spans(event, table, state="included")

    def _read_table(self, directory: RankDirectory, event: Event) -> WeightTable | None:
        try:
            return directory.events.table(event)
        except FileNotFoundError:
            return None
        except UnreadableError as error:
            logger.warning("%s", error)
            return None

    def _noted(self, directory: RankDirectory) -> _Exported:
        try:
            return directory.exported(_Exported)
        except (OSError, UnreadableError):
            return _Exported()

    def _note(self, directory: RankDirectory, exported: _Exported) -> None:
        try:
            directory.note_exported(msgspec.json.encode(exported))
        except OSError:
            return  # A full disk: the next span carries the table again.

    def _remembered(self, directory: RankDirectory) -> dict[str, SentTable]:
        exported = self._noted(directory)
        return exported.tables if exported.destination == self._destination else {}

    def _remember(self, directory: RankDirectory, role: str, sent: SentTable) -> None:
        tables = {**self._remembered(directory), role: sent}
        noted = self._noted(directory)
        self._note(
            directory,
            _Exported(destination=self._destination, dropped=noted.dropped, tables=tables),
        )

    def _give_up(self, path: Path, reason: str, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._counts.dropped[reason] += 1
        self._done.add(path)
        path.unlink(missing_ok=True)

    def _count_dropped(self, directory: RankDirectory) -> None:
        """Take over what a rank says it dropped because too much waited, once: what another
        exporter process has counted is noted beside the snapshot."""
        try:
            status = (directory.path / "snapshot").lstat()
            version = (status.st_ino, status.st_mtime_ns)
            if self._counted.get(directory.rank_id) == version:
                return
            dropped = directory.snapshot().events_dropped
        except (OSError, UnreadableError):
            return
        noted = self._noted(directory)
        if dropped > noted.dropped:
            self._counts.dropped["queue_full"] += dropped - noted.dropped
            self._note(directory, msgspec.structs.replace(noted, dropped=dropped))
        self._counted[directory.rank_id] = version

    def _bound_dead(self) -> None:
        """Drop what the oldest dead ranks left when all of it is too much."""
        dead: list[tuple[float, int, RankDirectory]] = []
        for directory in rank_directories(self._runtime_dir):
            if directory.is_alive():
                continue
            try:
                newest, nbytes = directory.events.size()
            except FileNotFoundError:
                continue  # Removed in this moment.
            if nbytes:
                dead.append((newest, nbytes, directory))
        dead.sort(key=lambda entry: entry[0], reverse=True)
        total = 0
        for _, size, directory in dead:
            total += size
            if total > self._dead_bytes:
                events = directory.events.waiting()
                logger.warning(
                    "%d loads and updates of the rank %s, which has ended, are given up: the "
                    "collector at %s did not take them, and more than %d bytes wait.",
                    len(events),
                    directory.rank_id,
                    self._collector.destination,
                    self._dead_bytes,
                )
                directory.remove()
                self._counts.dropped["queue_full"] += len(events)
