# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The directory that ranks, the exporter process and the command line share."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sglang_weight_exporter.store.files import Directory

VARIABLE = "SGLANG_WEIGHT_EXPORTER_RUNTIME_DIR"


class RuntimeDirError(Exception):
    """The runtime directory cannot be trusted or made; the message says why and what to do."""


def default_path(environ: Mapping[str, str], uid: int) -> Path:
    """``$XDG_RUNTIME_DIR/sglang-weight-exporter``, else one of the user's own in ``/tmp``.

    ``su`` and ``sudo`` leave another user's ``XDG_RUNTIME_DIR`` in place, who can do there what he
    likes: only one that belongs to this user is taken.
    """
    xdg = environ.get("XDG_RUNTIME_DIR", "")
    if xdg and _belongs_to(Path(xdg), uid) and os.access(xdg, os.W_OK):
        return Path(xdg) / "sglang-weight-exporter"
    return Path(tempfile.gettempdir()) / f"sglang-weight-exporter-{uid}"


def _belongs_to(path: Path, uid: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid


class NoRuntimeDirError(RuntimeDirError):
    """There is none: no engine of this user publishes there."""


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
            directory.open_ranks().close()
        except OSError as error:
            problem = directory._problem(uid)
            if problem:
                raise _untrusted(directory.path, problem) from error
            raise RuntimeDirError(
                f"The runtime directory {directory.path} cannot be made ({error.strerror}), so "
                f"nothing is published. Set {VARIABLE} to a directory that this user can write to."
            ) from error
        return directory

    @classmethod
    def find(cls, path: Path | None, environ: Mapping[str, str]) -> RuntimeDir:
        """The same for who only reads: nothing is made. Raises :class:`NoRuntimeDirError` too."""
        directory = path or default_path(environ, os.getuid())
        if not directory.is_symlink() and not directory.exists():
            raise NoRuntimeDirError(
                f"There is no runtime directory {directory}, so no engine publishes there. Where "
                f"one runs: it may be another user's, have another {VARIABLE}, have been started "
                "before the package was installed, or with SGLANG_WEIGHT_EXPORTER_DISABLED."
            )
        return cls.open(path, environ)

    def open_ranks(self) -> Directory:
        """The directory of the ranks' directories, opened from one that was checked when it was
        open. Raises ``OSError`` and :class:`RuntimeDirError`."""
        with Directory.open(self.path) as root:
            problem = _problem_with(root.status(), os.getuid())
            if problem:
                raise _untrusted(self.path, problem)
            return root.open_directory(self.ranks.name, make=True)

    def _problem(self, uid: int) -> str:
        try:
            return _problem_with(self.path.lstat(), uid)
        except OSError:
            return ""

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def ended(self) -> Path:
        """What ranks left that ended in the middle of something."""
        return self.path / "ended"

    @property
    def exporter_lock(self) -> Path:
        return self.path / "exporter.lock"

    @property
    def exporter_file(self) -> Path:
        return self.path / "exporter.json"

    @property
    def engines_lock(self) -> Path:
        return self.path / "engines.lock"


def _problem_with(status: os.stat_result, uid: int) -> str:
    """Why a directory is not to be trusted; empty if it is."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a directory"
    if status.st_uid != uid:
        return f"belongs to the user with id {status.st_uid} and not to {uid}"
    if status.st_mode & 0o077:
        return f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}, not 0700)"
    return ""


def _untrusted(path: Path, problem: str) -> RuntimeDirError:
    return RuntimeDirError(
        f"The runtime directory {path} {problem}, so nothing is written to it. "
        f"Remove it or mend it, or set {VARIABLE} to another directory."
    )
