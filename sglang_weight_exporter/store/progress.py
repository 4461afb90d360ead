# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A rank's progress: one file that is written in place with one system call, and read whole.

The length of the record and its checksum stand before it: a reader that meets a writer finds that
they do not fit, and reads again. Not mapped into memory, because a process that touches a mapped
file that somebody has made shorter is killed.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from sglang_weight_exporter.records.snapshot import Progress, Snapshot
from sglang_weight_exporter.store.decoding import UnreadableError, decode
from sglang_weight_exporter.store.encoding import encode
from sglang_weight_exporter.store.files import Directory, read_file

FILE = "progress"

_HEADER = struct.Struct("<II")
#: Space that the file has from the beginning, so that a disk that is full later changes nothing.
_SPACE = 4096
_TRIES = 10


class ProgressWriter:
    """The rank's side. Raises ``OSError``."""

    _descriptor = -1

    def __init__(self, directory: Directory) -> None:
        directory.write(FILE, bytes(_SPACE))
        self._descriptor = directory.open_file(FILE, os.O_WRONLY)

    def write(self, progress: Progress) -> None:
        content = encode(progress)
        if _HEADER.size + len(content) > _SPACE:
            raise OSError(f"{len(content)} bytes of progress are more than fit")
        os.pwrite(self._descriptor, _HEADER.pack(len(content), zlib.crc32(content)) + content, 0)

    def is_there(self) -> bool:
        """Whether the file has a name by which readers find it."""
        return os.fstat(self._descriptor).st_nlink > 0

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class ProgressReader:
    """Reads the progress of one rank again and again; the same is the same object."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._last: tuple[Snapshot, bytes, Snapshot] | None = None

    def apply(self, snapshot: Snapshot) -> Snapshot:
        """The rank's snapshot with what has changed since. Raises nothing: a progress that cannot
        be read is none."""
        record = self._record()
        last = self._last
        if last is None or last[0] is not snapshot or last[1] != record:
            self._last = last = snapshot, record, self._applied(snapshot, record)
        return last[2]

    def _applied(self, snapshot: Snapshot, record: bytes) -> Snapshot:
        if not record:
            return snapshot
        try:
            return snapshot.with_progress(decode(record, Progress, self._path))
        except UnreadableError:
            return snapshot

    def _record(self) -> bytes:
        """Empty where there is none."""
        for _ in range(_TRIES):
            try:
                content = read_file(self._path, _SPACE)
            except OSError:
                return b""
            if len(content) < _HEADER.size:
                return b""
            length, checksum = _HEADER.unpack_from(content)
            record = content[_HEADER.size : _HEADER.size + length]
            if zlib.crc32(record) == checksum:
                return record
        return b""
