# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Reading and writing where somebody else may have been at work.

Ranks and the exporter often run as root, and a directory of theirs may lie in one that another
user can write to. What is made or removed goes through an open directory and follows no link, so
that it stays where it was checked, whatever a path has come to mean since.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: What :func:`read_file` raises for what will never be a file that can be read.
NEVER_READABLE = {errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.EISDIR}

_TEMPORARY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class Directory:
    """An open directory, closed by ``with`` or with its last reference. All methods raise
    ``OSError``; one that is gone has no file (``FileNotFoundError``)."""

    def __init__(self, path: Path, descriptor: int) -> None:
        #: Where it was opened, for messages.
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> Directory:
        return cls(path, os.open(path, _DIRECTORY))

    def open_directory(self, name: str, *, make: bool = False) -> Directory:
        """A directory in this one; ``make`` it, with mode 0700, if it is missing."""
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self._descriptor)
        return Directory(self.path / name, os.open(name, _DIRECTORY, dir_fd=self._descriptor))

    def open_file(self, name: str, flags: int) -> int:
        """A descriptor of a file in this directory, made with mode 0600."""
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file by one of mode 0600 with this content; on failure nothing is left.

        Not synced to disk: what a rank says of itself need not survive the machine.
        """
        temporary = f".{name}.{os.urandom(4).hex()}"
        descriptor = os.open(temporary, _TEMPORARY, 0o600, dir_fd=self._descriptor)
        try:
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
            finally:
                os.close(descriptor)
            self.rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._descriptor)
            raise

    def link(self, name: str, directory: Directory, new_name: str) -> None:
        """Give a file of this directory a name in another one as well."""
        os.link(
            name,
            new_name,
            src_dir_fd=self._descriptor,
            dst_dir_fd=directory._descriptor,
            follow_symlinks=False,
        )

    def rename(self, name: str, new_name: str) -> None:
        os.rename(name, new_name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> bool:
        """Remove a file; whether it was there."""
        try:
            os.unlink(name, dir_fd=self._descriptor)
        except FileNotFoundError:
            return False
        return True

    def remove_all(self, name: str) -> None:
        """Remove an entry, of a directory all that is in it too, as far as that can be done."""
        try:
            self.remove(name)
        except OSError:
            # An entry of an open directory; the links inside are removed and not followed.
            shutil.rmtree(f"/proc/self/fd/{self._descriptor}/{name}", ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether there is a regular file of this name."""
        try:
            return stat.S_ISREG(self.file_status(name).st_mode)
        except FileNotFoundError:
            return False

    def file_status(self, name: str) -> os.stat_result:
        """The status of an entry itself, also of a link."""
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def size(self, name: str) -> int:
        return self.file_status(name).st_size

    def is_at(self, path: Path) -> bool:
        """Whether this is still the directory at a path."""
        try:
            there = path.lstat()
        except OSError:
            return False
        here = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def status(self) -> os.stat_result:
        return os.fstat(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises ``OSError``, also for what is no file (a FIFO would wait for a writer, for good) or is
    larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        pieces, left = list[bytes](), limit + 1
        while status.st_size <= limit and left:
            piece = os.read(descriptor, min(left, status.st_size + 1))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            left -= len(piece)
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file of mode 0600 with this content; on failure nothing is left."""
    with Directory.open(path.parent) as directory:
        directory.write(path.name, content)
