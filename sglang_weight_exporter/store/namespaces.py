# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether two processes mean the same by a process id.

Each container counts its processes for itself, and the NVIDIA driver names them as the host does.
"""

from __future__ import annotations

import functools
from pathlib import Path

#: Inode of the host's own namespace (``PROC_PID_INIT_INO`` of Linux).
HOST_PIDS = 0xEFFFFFFC


@functools.cache
def pid_namespace() -> int:
    """Inode of the namespace that this process's id is of, which stays; 0: not known."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
