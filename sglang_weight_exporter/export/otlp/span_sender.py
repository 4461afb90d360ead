# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting events → the collector. An event's file goes once the collector has acknowledged it.

The store is the queue, so what waits outlives this process and the engine. A rank bounds its own
queue (``store.spool``); what dead ranks left is bounded here. Whatever is dropped is counted. What
goes wrong with one rank is that rank's: each step of a pass is guarded, and the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from sglang_weight_exporter.export.following import Finding, Followers
from sglang_weight_exporter.export.guard import Guard
from sglang_weight_exporter.export.otlp.black_box_spans import black_box_spans
from sglang_weight_exporter.export.otlp.client import ExportResult, OtlpClient
from sglang_weight_exporter.export.otlp.notes import ExportNotes
from sglang_weight_exporter.export.otlp.spans import (
    EventSpans,
    SentTable,
    event_spans,
    selected,
)
from sglang_weight_exporter.export.views import SpanCounts
from sglang_weight_exporter.records.event import Event
from sglang_weight_exporter.store.decoding import UnreadableError
from sglang_weight_exporter.store.files import NEVER_READABLE
from sglang_weight_exporter.store.reader import RankDirectory, SnapshotReader, rank_directories
from sglang_weight_exporter.store.spool import EVENT_BYTES
from sglang_weight_exporter.weight_table import WeightTable
from sglang_weight_exporter.weight_table_events import DEFAULT_LIMITS, Limits

logger = logging.getLogger("sglang_weight_exporter")

#: Between two passes over the store.
PASS_SECONDS = 1.0

#: Between two tries at a collector that does not answer: from, to, each twice the one before.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

#: How often the oldest event may fail before others are tried first, how many may fail at a time,
#: and how often one may fail while others are taken before it is dropped.
PATIENCE = 3
FAILURES = 3
REFUSALS = 5
#: How often another one is tried before it is the next one's turn: each has to be encoded.
TURN = 20

#: What dead ranks may leave, all together, before the oldest of them is dropped.
DEAD_BYTES = 4 * EVENT_BYTES

#: Messages that were not taken are kept encoded, of so many events and in so many bytes.
PREPARED_EVENTS = 2
PREPARED_BYTES = 64 * 2**20

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Prepared:
    """An event as messages, and which table the collector has with them."""

    role: str
    #: And whom each is for.
    messages: tuple[tuple[OtlpClient, bytes], ...]
    sent: SentTable | None

    @property
    def nbytes(self) -> int:
        return sum(len(content) for _, content in self.messages)


class _NotYetError(Exception):
    """The load is being compared with its reference."""


def _left_by_dead(directory: RankDirectory) -> tuple[float, int]:
    """When a rank that has ended queued something last, and the bytes that wait of it."""
    return (0.0, 0) if directory.is_alive() else directory.events.size()


class SpanSender:
    """Sends the events of all ranks, dead ones included, from a thread of its own.

    ``table``: whether it is sent, and of which ``names``; ``logs``: who takes it as log records;
    ``in_spans``: whether it is events of spans. ``references``: what a load is compared with, which
    its span waits for. ``limits``: of a message.
    """

    def __init__(
        self,
        snapshots: SnapshotReader,
        collector: OtlpClient,
        counts: SpanCounts,
        guard: Guard,
        *,
        table: bool = True,
        names: re.Pattern[str] | None = None,
        logs: OtlpClient | None = None,
        in_spans: bool = True,
        followers: Followers | None = None,
        limits: Limits = DEFAULT_LIMITS,
        dead_bytes: int = DEAD_BYTES,
    ) -> None:
        self._snapshots = snapshots
        self._collector = collector
        self._counts = counts
        self._guard = guard
        self._table = table
        self._names = names
        self._logs = logs
        self._in_spans = in_spans
        self._followers = followers
        self._limits = limits
        self._dead_bytes = dead_bytes
        destination = f"{collector.destination}|{names.pattern if names else ''}"
        if logs is not None:
            destination += f"|{logs.destination}|{in_spans}"
        self._notes = ExportNotes(destination)
        self._failures: Counter[Path] = Counter()
        self._refusals: Counter[Path] = Counter()
        self._prepared: dict[Path, _Prepared] = {}
        #: Taken or dropped, and not yet removed: a directory may have become read-only.
        self._done: set[Path] = set()
        #: Rank → the version of its snapshot whose dropped events are counted.
        self._counted: dict[str, object] = {}
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
            stopping = self._stop.wait(pause or PASS_SECONDS)
            if stopping and pause:
                return  # The collector does not answer; what waits is kept.
            delivered = False
            with self._guard.step("Sending spans"):
                delivered = self.deliver()
            if stopping:
                return
            if delivered:
                pause = 0.0
            else:
                pause = min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                pause *= random.uniform(0.8, 1.0)  # noqa: S311
            pause = max(pause, self._wait_seconds)

    def deliver(self) -> bool:
        """Send all that waits, oldest first. False if the collector took nothing of it.

        When the first one keeps failing, another is tried before it: if the collector takes that,
        it refuses the first for what it is, which must not keep the others waiting.
        """
        waiting = self._waiting()
        if len(waiting) > 1 and self._failures[waiting[0][1]] >= PATIENCE:
            other = min(waiting[1:], key=lambda entry: self._failures[entry[1]] // TURN)
            waiting.remove(other)
            waiting.insert(0, other)
        settled = failed = 0
        for directory, path in waiting:
            try:
                result = self._send(directory, path)
            except _NotYetError:
                continue
            except Exception as error:
                # Such as too many open files: perhaps it can be read next time.
                if not self._failures[path]:
                    logger.warning(
                        "%s cannot be read or removed now (%r). It is tried again.", path, error
                    )
                self._failures[path] += 1
                continue
            if result.settled:
                settled += 1
                self._counts.waiting -= 1
                continue
            failed += 1
            self._failures[path] += 1
            if self._wait_seconds:
                break  # It has too much to do, whatever it is sent.
            if settled:
                self._count_refusal(path, result)
            if not settled or failed == FAILURES:
                break
        return settled > 0 or not failed

    def _count_refusal(self, path: Path, result: ExportResult) -> None:
        self._refusals[path] += 1
        if self._refusals[path] >= REFUSALS:
            logger.warning(
                "The collector at %s refused %s %d times and took others (%s), so it is dropped.",
                self._collector.destination,
                path.name,
                REFUSALS,
                result.reason,
            )
            self._drop(path, "refused")

    # What waits.

    def _waiting(self) -> list[tuple[RankDirectory, Path]]:
        """Events of all ranks, each rank's oldest first, without what is too much."""
        directories = list(rank_directories(self._snapshots.runtime_dir))
        self._bound_dead(directories)
        waiting = []
        for directory in directories:
            self._of_rank(directory, self._count_dropped, None)
            found = self._of_rank(directory, lambda each: each.events.waiting(), list[Path]())
            waiting += [(directory, path) for path in found]
        self._counts.waiting = len(waiting)
        paths = {path for _, path in waiting}
        self._done &= paths
        for known in (self._failures, self._refusals, self._prepared):
            for path in known.keys() - paths:
                known.pop(path)
        return waiting

    def _of_rank(
        self, directory: RankDirectory, read: Callable[[RankDirectory], Result], other: Result
    ) -> Result:
        """What is read of one rank; the ``other`` where that goes wrong, which is this rank's."""
        with (
            self._guard.step(f"Sending spans of {directory.path}"),
            contextlib.suppress(FileNotFoundError),  # Removed in this moment.
        ):
            return read(directory)
        return other

    def _count_dropped(self, directory: RankDirectory) -> None:
        """Take over what a rank says it dropped because too much waited, once: what another
        exporter process has counted is noted beside the snapshot."""
        version, snapshot = self._snapshots.of(directory)
        if self._counted.get(directory.rank_id) == version:
            return
        dropped = 0 if snapshot is None else snapshot.events_dropped
        noted = self._notes.dropped(directory)
        if dropped > noted:
            self._counts.dropped["queue_full"] += dropped - noted
            self._notes.note_dropped(directory, dropped)
        self._counted[directory.rank_id] = version

    def _bound_dead(self, directories: list[RankDirectory]) -> None:
        """Drop what the oldest dead ranks left when all of it is too much."""
        dead: list[tuple[float, int, RankDirectory]] = []
        for directory in directories:
            newest, nbytes = self._of_rank(directory, _left_by_dead, (0.0, 0))
            if nbytes:
                dead.append((newest, nbytes, directory))
        dead.sort(key=lambda entry: entry[0], reverse=True)
        total = 0
        for _, size, directory in dead:
            total += size
            if total > self._dead_bytes:
                self._of_rank(directory, self._drop_dead, None)

    def _drop_dead(self, directory: RankDirectory) -> None:
        events = directory.events.waiting()
        logger.warning(
            "%d loads and updates of the rank %s, which has ended, are dropped: the collector at "
            "%s did not take them, and more than %d bytes wait.",
            len(events),
            directory.rank_id,
            self._collector.destination,
            self._dead_bytes,
        )
        directory.remove()
        self._counts.dropped["queue_full"] += len(events)

    # One event.

    def _send(self, directory: RankDirectory, path: Path) -> ExportResult:
        """Settled when nothing of this event has to wait any more. Raises ``OSError`` when it
        cannot be read or removed now."""
        settled = ExportResult(True)
        if path in self._done:
            path.unlink(missing_ok=True)
            return settled
        prepared = self._prepared.pop(path, None) or self._prepare(directory, path)
        if prepared is None:
            return settled
        rejected = 0
        exported = 0
        for client, message in prepared.messages:
            result = client.take(message)
            if not result.taken:
                self._counts.failures += 1
                if result.retryable:
                    self._keep(path, prepared)
                else:
                    # Its table is not noted as sent: the next span carries it again.
                    self._drop(path, "refused")
                return result
            rejected += min(result.rejected, 1)
            exported += client is self._collector and not result.rejected
        self._counts.exported += exported
        if rejected:
            # OTLP forbids to send it again.
            self._counts.dropped["refused"] += 1
        self._done.add(path)
        # In this order: killed between the two, the table is sent once more and never taken for
        # sent when it is not.
        path.unlink(missing_ok=True)
        if prepared.sent is not None and not rejected:
            self._notes.note_table(directory, prepared.role, prepared.sent)
        return settled

    def _prepare(self, directory: RankDirectory, path: Path) -> _Prepared | None:
        """The messages of an event; ``None``: it is gone, or dropped because it is none. Raises
        ``_NotYetError``."""
        try:
            if (box := directory.events.black_box(path)) is not None:
                message = encode_spans(list(black_box_spans(box))).SerializeToString()
                return _Prepared("", ((self._collector, message),), None)
            event = directory.events.event(path)
        except FileNotFoundError:
            return None  # The rank has dropped it in this moment, and counts it.
        except (OSError, UnreadableError) as error:
            if isinstance(error, OSError) and error.errno not in NEVER_READABLE:
                raise
            logger.warning("%s Its load or update is missing among the spans.", error)
            self._drop(path, "unreadable")
            return None
        finding: Finding | None = Finding()
        if self._followers is not None:
            finding = self._followers.of_event(event)
        if finding is None:
            raise _NotYetError
        try:
            built = self._spans(directory, event, finding)
            return _Prepared(event.role, tuple(self._messages(built)), built.sent)
        except OSError:
            raise
        except Exception as error:
            # It is for its rank alone, and once: the events of all others wait behind it.
            logger.warning(
                "No span can be made of %s (%s: %s), so it is dropped. Its load or update is "
                "missing among the spans.",
                path,
                type(error).__name__,
                error,
            )
            self._drop(path, "unreadable")
            return None

    def _messages(self, built: EventSpans) -> Iterator[tuple[OtlpClient, bytes]]:
        """The table before the span that says that it was sent."""
        requests = [encode_spans([span]) for span in built.spans]
        if built.sent is not None and self._logs is not None:
            from sglang_weight_exporter.export.otlp.table_logs import table_logs, without_table

            (context,) = requests[0].resource_spans[0].scope_spans[0].spans
            for request in requests:
                yield self._logs, table_logs(request, context).SerializeToString()
            if not self._in_spans:
                requests = [without_table(requests[0])]
        for request in requests:
            yield self._collector, request.SerializeToString()

    @property
    def _wait_seconds(self) -> float:
        """For how long a collector wants to be left alone."""
        return max(each.wait_seconds for each in (self._collector, self._logs) if each is not None)

    def _keep(self, path: Path, prepared: _Prepared) -> None:
        """For the next try. A table of 100,000 rows takes seconds to encode."""
        if prepared.nbytes <= PREPARED_BYTES:
            self._prepared[path] = prepared
            while len(self._prepared) > PREPARED_EVENTS:
                del self._prepared[next(iter(self._prepared))]

    def _spans(self, directory: RankDirectory, event: Event, finding: Finding) -> EventSpans:
        spans = functools.partial(event_spans, event, finding=finding)
        if not self._table:
            return spans(None, state="disabled")
        if event.table is None:
            return spans(None, state="missing")
        sent = self._notes.tables(directory).get(event.role)
        if sent is not None and sent.sha256 == event.table.sha256:
            return spans(None, state="unchanged", unchanged_since=sent)
        table = self._read_table(directory, event)
        if table is None:
            return spans(None, state="missing")
        if self._names is not None:
            table = selected(table, self._names)
        return spans(table, state="included", limits=self._limits)

    def _read_table(self, directory: RankDirectory, event: Event) -> WeightTable | None:
        try:
            return directory.events.table(event)
        except (OSError, UnreadableError) as error:
            if isinstance(error, OSError) and error.errno not in NEVER_READABLE | {errno.ENOENT}:
                raise
            if not isinstance(error, FileNotFoundError):
                logger.warning("%s", error)
            return None

    def _drop(self, path: Path, reason: str) -> None:
        self._counts.dropped[reason] += 1
        self._done.add(path)
        path.unlink(missing_ok=True)
