# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Locks that the kernel takes back when their holder dies (``flock``)."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path
from types import TracebackType

from sglang_weight_exporter.store.files import Directory

#: All that this process has. A child that outlives its parent would keep a dead rank alive.
_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


class FileLock:
    """An ``flock`` on a file of its own, in one of two modes.

    A lock belongs to the open file and a forked child shares it, so the child's copy is closed at
    fork, also one for which a thread of its parent's waits for the lock. It means nothing once
    another file is at the path, because others lock that one: such a lock is never taken, and
    :meth:`is_current` says of one that was taken before. A lock that nobody refers to any more is
    closed.

    ``directory``: where the file is, opened; ``path`` is then for messages. ``create``: off, the
    file must be there.
    """

    def __init__(
        self, path: Path, *, directory: Directory | None = None, create: bool = True
    ) -> None:
        self.path = path
        self._directory = directory
        self._flags = os.O_RDWR | (os.O_CREAT if create else 0)
        self._descriptor: int | None = None
        #: Of a file that is open and not locked, yet or any more.
        self._opened: int | None = None
        _locks.add(self)

    def acquire(self, *, exclusive: bool = True, block: bool = False) -> bool:
        """Take the lock; ``False`` if someone else holds it and ``block`` is off.

        Raises ``OSError`` when the file cannot be opened.
        """
        if self._descriptor is not None:
            raise RuntimeError(f"{self.path} is locked by this object already.")
        operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (
            0 if block else fcntl.LOCK_NB
        )
        while True:
            kept = self._opened is not None
            descriptor = self._opened = self._open() if self._opened is None else self._opened
            try:
                fcntl.flock(descriptor, operation)
                if kept or self._is_at_path(descriptor):
                    self._descriptor, self._opened = descriptor, None
                    return True
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    return False
                raise
            finally:
                if not kept:
                    self._opened = None
                    if self._descriptor != descriptor:
                        os.close(descriptor)
            # Its directory was removed and made again meanwhile.

    def _open(self) -> int:
        if self._directory is not None:
            return self._directory.open_file(self.path.name, self._flags)
        return os.open(self.path, self._flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _is_at_path(self, descriptor: int) -> bool:
        ours = os.fstat(descriptor)
        try:
            if self._directory is not None:
                there = self._directory.file_status(self.path.name)
            else:
                there = self.path.lstat()
        except FileNotFoundError:
            return False
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)

    def is_current(self) -> bool:
        """Whether the lock is held, or was and its file is still open (:meth:`unlock`), on the file
        that others would lock too."""
        descriptor = self._opened if self._descriptor is None else self._descriptor
        try:
            return descriptor is not None and self._is_at_path(descriptor)
        except OSError:
            return True  # It is not known, so nothing is known to be wrong.

    def adopt(self, descriptor: int) -> None:
        """Own a lock that another process has taken and handed down."""
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def fileno(self) -> int:
        """The descriptor, to be handed to a child process that is to own the lock."""
        if self._descriptor is None:
            raise RuntimeError(f"{self.path} is not locked by this object.")
        return self._descriptor

    def close(self) -> None:
        """Let go of our copy; a child that it was handed to keeps the lock."""
        for descriptor in (self._descriptor, self._opened):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._opened = None

    def unlock(self) -> None:
        """Unlock and keep the file open: the next :meth:`acquire` takes it as it is, so whoever
        keeps it finds out whether it is still there (:meth:`is_current`)."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._descriptor, self._opened = None, self._descriptor

    def __del__(self) -> None:
        self.close()

    def release(self) -> None:
        """Unlock, for every process that shares this open file."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether anybody holds the lock exclusively. A file that is not there is held by nobody.

    The lock is tried shared and let go at once: two who ask do not see each other.
    """
    try:
        # O_NONBLOCK: a FIFO of this name would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return True
        raise
    finally:
        os.close(descriptor)
    return False
