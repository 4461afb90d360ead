# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Loads: the first values of a role's weights, and when their table is what it will be."""

from __future__ import annotations

import msgspec

from sglang_weight_exporter.ledger.open_update import elapsed
from sglang_weight_exporter.ledger.roles import RoleAccounts
from sglang_weight_exporter.records.updates import Update


class Loads:
    """Loads of one process. While it starts none is reported, because a draft gives up its own
    embeddings for the target's only at the end."""

    def __init__(self, roles: RoleAccounts) -> None:
        self._roles = roles
        self._lock = roles.lock
        self._starting = False
        self._began_at: float | None = None

    def begin_start(self) -> None:
        """The process loads its models."""
        with self._lock:
            self._starting = True

    def end_start(self) -> None:
        """All models are loaded and share what they share."""
        with self._lock:
            self._starting = False
            for name in self._roles.by_name:
                self.report(name)

    @property
    def starting(self) -> bool:
        """Whether the process still loads its models."""
        return self._starting

    def begin(self) -> float:
        """A load begins; the time it began, also kept for :attr:`began_at`."""
        with self._lock:
            self._began_at = self._roles.clock()
            return self._began_at

    @property
    def began_at(self) -> float | None:
        """When the last load began."""
        return self._began_at

    def end(
        self,
        name: str,
        started_at: float | None,
        *,
        error: str = "",
        placeholders: bool = False,
        model_path: str = "",
        weight_version: str = "",
    ) -> None:
        """A load has ended. ``started_at``: ``None`` where no load was seen to begin.
        ``placeholders``: its values come later (:meth:`finalize`)."""
        if started_at is None:
            return
        with self._lock:
            role = self._roles[name]
            ended_at = self._roles.clock()
            if placeholders:
                role.loading_since = started_at
            elif not error:
                if role.loaded_at is None:
                    role.loaded_at = ended_at
                    role.load_seconds = elapsed(started_at, ended_at)
                role.updated_at = ended_at
                role.update_started_at = started_at
            if not error:
                role.model_path = model_path
                self._roles.weight_version = self._roles.weight_version or weight_version
            role.last_update = role.unreported_load = Update(
                action="load",
                sequence=self._roles.next_number(),
                started_at=started_at,
                ended_at=ended_at,
                succeeded=not error,
                effect="undefined" if error else "changed",
                message=error,
                model_path=model_path,
                weight_version=self._roles.weight_version,
            )
            if error:
                self.report(name)

    def finalize(self, name: str, *, error: str = "") -> None:
        """The values of a load that had left placeholders have come."""
        with self._lock:
            role = self._roles[name]
            if role.loading_since is None or role.unreported_load is None:
                return
            started_at, role.loading_since = role.loading_since, None
            ended_at = self._roles.clock()
            if not error:
                role.loaded_at = role.updated_at = ended_at
                role.update_started_at = started_at
                role.load_seconds = elapsed(started_at, ended_at)
            role.last_update = role.unreported_load = msgspec.structs.replace(
                role.unreported_load,
                ended_at=ended_at,
                succeeded=not error,
                effect="undefined" if error else "changed",
                message=error,
            )
            self.report(name)

    def report(self, name: str) -> None:
        """The table of a load is what it will be: let the load have ended, if it has."""
        with self._lock:
            role = self._roles[name]
            if self._starting or role.loading_since is not None:
                return
            load, role.unreported_load = role.unreported_load, None
            if load is not None:
                self._roles.finish_load(name, load)
