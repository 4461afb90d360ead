# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The directory that ranks, the exporter process and the command line share."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR"


class RuntimeDirError(Exception):
    """The runtime directory cannot be trusted or made; the message says why and what to do."""


def default_path(environ: Mapping[str, str], uid: int) -> Path:
    """``$XDG_RUNTIME_DIR/sglang-weight-exporter``, else one of the user's own in ``/tmp``."""
    xdg = environ.get("XDG_RUNTIME_DIR", "")
    if xdg and Path(xdg).is_dir() and os.access(xdg, os.W_OK):
        return Path(xdg) / "sglang-weight-exporter"
    return Path(tempfile.gettempdir()) / f"sglang-weight-exporter-{uid}"


class RuntimeDir:
    """A directory of mode 0700 that belongs to this user and is no symbolic link.

    Pointers lie in it, and whoever can write to it can feed numbers to a fleet's dashboards:
    anything else is refused with :class:`RuntimeDirError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | None, environ: Mapping[str, str]) -> RuntimeDir:
        """The directory at ``path`` (or the default), made if it is missing."""
        uid = os.getuid()
        directory = cls(path or default_path(environ, uid))
        try:
            if path is not None:
                directory.path.parent.mkdir(parents=True, exist_ok=True)
            directory.path.mkdir(mode=0o700, exist_ok=True)
            directory._check(uid)
            directory.ranks.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            if os.path.lexists(directory.path):
                directory._check(uid)
            raise RuntimeDirError(
                f"The runtime directory {directory.path} cannot be made ({error.strerror}), so "
                f"nothing is published. Set {VARIABLE} to a directory that this user can write to."
            ) from error
        return directory

    def _check(self, uid: int) -> None:
        status = self.path.lstat()
        if stat.S_ISLNK(status.st_mode):
            problem = "is a symbolic link"
        elif not stat.S_ISDIR(status.st_mode):
            problem = "is not a directory"
        elif status.st_uid != uid:
            problem = f"belongs to the user with id {status.st_uid} and not to {uid}"
        elif status.st_mode & 0o077:
            problem = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}, not 0700)"
        else:
            return
        raise RuntimeDirError(
            f"The runtime directory {self.path} {problem}, so nothing is written to it. "
            f"Remove it or mend it, or set {VARIABLE} to another directory."
        )

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def exporter_lock(self) -> Path:
        return self.path / "exporter.lock"

    @property
    def exporter_file(self) -> Path:
        return self.path / "exporter.json"

    @property
    def engines_lock(self) -> Path:
        return self.path / "engines.lock"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by a file of mode 0600 with this content; on failure nothing is left.

    Not synced to disk: what a rank says of itself need not survive the machine.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
