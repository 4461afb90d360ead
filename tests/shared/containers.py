# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Images built without a registry, and their containers, without a container engine.

Debian's `mmdebstrap` makes the base and Debian's `buildah` builds on it; both as root. A container
here has its own root, read-only, its own processes, and neither a capability nor a way to one; it
shares what is mounted into it, and the host's network, as a pod's containers share theirs.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from waiting import LIMIT

#: Where pip has its settings, and what it verifies registries by; a build needs the host's.
SETTINGS = ("/etc/pip.conf", "/etc/ssl/certs")


def needs_root_and_debian(*programs: str) -> None:
    """Skips, or in CI fails, where roots cannot be made: also in a container without rights."""
    mounts = ["unshare", "--mount", "--pid", "--fork", "true"]
    found = all(shutil.which(name) for name in programs)
    if found and os.getuid() == 0 and subprocess.run(mounts).returncode == 0:
        return
    message = (
        f"needs root with the right to mount, and Debian's {' and '.join(programs)}, which"
        " `make test` installs"
    )
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@dataclass(frozen=True)
class Image:
    """A built image, unpacked: its root, and what it says about how it is run."""

    root: Path
    config: dict[str, Any]


class Builder:
    """buildah with a store of its own in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        settings = directory / "storage.conf"
        roots = f'graphroot = "{directory}/images"\nrunroot = "{directory}/run"\n'
        settings.write_text(f'[storage]\ndriver = "vfs"\n{roots}')
        self.environment = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_STORAGE_CONF": str(settings),
        }

    def __call__(self, *arguments: str | Path) -> str:
        command = ["buildah", *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def debian(self, name: str, *packages: str) -> None:
        """An image of Debian 12 with nothing but what is essential and these packages."""
        archive = self.directory / "debian.tar"
        unread = [
            f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")
        ]
        included = f"--include={','.join(packages)}"
        command = ["mmdebstrap", "--quiet", "--variant=essential", included, *unread]
        done = subprocess.run([*command, "bookworm", archive], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        container = self("from", "scratch")
        self("add", "--quiet", container, archive, "/")
        archive.unlink()
        self("commit", "--quiet", "--rm", container, name)

    def build(self, context: Path, name: str, **arguments: str) -> Image:
        """`buildah build` of the Containerfile there, with build arguments."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        mounts = [f"--volume={path}:{path}:ro" for path in SETTINGS if Path(path).exists()]
        self("build", "--quiet", *given, *mounts, "--tag", name, context)
        return self.unpacked(name)

    def unpacked(self, name: str) -> Image:
        container = self("from", "--pull-never", name)
        described = json.loads(self("inspect", "--type", "image", name))
        return Image(Path(self("mount", container)), described["OCIv1"]["config"])


@dataclass
class Container:
    """A process in an image's root; without a command the image's own."""

    image: Image
    log: Path
    command: list[str] = field(default_factory=list)
    #: "1000:1000"; by default the image's.
    user: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    #: Directories of the host, by where they are in the container.
    mounts: dict[str, Path] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Container:
        config = self.image.config
        described = {
            "root": str(self.image.root),
            "command": self.command or config.get("Entrypoint", []) + config.get("Cmd", []),
            "user": self.user or config.get("User", "0:0"),
            "directory": config.get("WorkingDir") or "/",
            "environment": {
                **dict(each.split("=", 1) for each in config.get("Env", [])),
                **self.environment,
            },
            "mounts": {inside: str(outside) for inside, outside in self.mounts.items()},
        }
        namespaces = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*namespaces, sys.executable, __file__, json.dumps(described)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def pid(self) -> int:
        """Of the container's first process, as the host counts."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text())

    def wait(self) -> int:
        """Its exit status."""
        assert self.process is not None
        return self.process.wait(LIMIT)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # And with it, by --kill-child, what it runs.
            self.process.wait()


def _enter(described: dict[str, Any]) -> None:
    """Become the container's process; runs in namespaces of its own."""
    root = described["root"]

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    mount("--bind", root, root)
    for inside, outside in {"/dev": "/dev", **described["mounts"]}.items():
        # The runtime makes what a volume is mounted on.
        Path(root + inside).mkdir(parents=True, exist_ok=True)
        mount("--bind", outside, root + inside)
    mount("-t", "proc", "proc", f"{root}/proc")
    mount("-o", "remount,bind,ro", root)
    os.chroot(root)
    os.chdir(described["directory"])
    libc = ctypes.CDLL(None, use_errno=True)
    drop_from_bounding_set, no_new_privileges = 24, 38  # linux/prctl.h
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        assert libc.prctl(drop_from_bounding_set, capability, 0, 0, 0) == 0
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    user, _, group = described["user"].partition(":")
    os.setgroups([])
    os.setgid(int(group or user))
    os.setuid(int(user))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    environment = described["environment"]
    os.execvpe(described["command"][0], described["command"], environment)


if __name__ == "__main__":
    _enter(json.loads(sys.argv[1]))
