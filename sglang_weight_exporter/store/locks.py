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

#: O_NOFOLLOW: nobody who can write to a shared temporary directory may make us open his file.
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class FileLock:
    """An ``flock`` on a file of its own, in one of two modes.

    A lock belongs to the open file and a forked child shares it, so a child that outlives its
    parent would keep a dead rank alive: the child's copy is closed at fork.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        close = weakref.WeakMethod(self.close)

        def close_in_child() -> None:
            method = close()
            if method is not None:
                method()

        os.register_at_fork(after_in_child=close_in_child)

    def acquire(self, *, exclusive: bool = True, block: bool = False) -> bool:
        """Take the lock; ``False`` if someone else holds it and ``block`` is off.

        Raises ``OSError`` when the file cannot be opened.
        """
        if self._descriptor is not None:
            raise RuntimeError(f"{self.path} is locked by this object already.")
        descriptor = os.open(self.path, _OPEN_FLAGS, 0o600)
        operation = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (
            0 if block else fcntl.LOCK_NB
        )
        try:
            fcntl.flock(descriptor, operation)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                return False
            raise
        self._descriptor = descriptor
        return True

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
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

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

    Looks without ever taking the lock exclusively, and lets go at once: two who look do not
    see each other.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
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
