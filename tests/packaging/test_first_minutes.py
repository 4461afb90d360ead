# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The README's first commands, on a Debian that has the packages it names and no more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import SETTINGS, needs_root_and_debian

pytestmark = pytest.mark.release("distribution")

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
USER = "1000:1000"
HOME = Path("home/somebody")


@pytest.fixture(scope="module")
def bare() -> Iterator[Path]:
    """The root directory of a new machine, with this checkout in somebody's home."""
    needs_root_and_debian("mmdebstrap")
    (named,) = re.findall(r"apt-get install ([a-z0-9 -]+)`", README)
    # Not in pytest's directories, which are closed to other users.
    root = Path(tempfile.mkdtemp(prefix="bare-"))
    root.chmod(0o755)
    try:
        included = ",".join(["ca-certificates", *named.split()])
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={included}"]
        subprocess.run([*command, "bookworm", root], check=True)
        (root / "etc/pip.conf").touch()
        (root / "etc/resolv.conf").touch()
        checkout = root / HOME / "checkout"
        checkout.parent.mkdir()
        listed = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
        files = subprocess.run(listed, cwd=PROJECT, check=True, capture_output=True).stdout
        for name in filter(None, files.decode().split("\0")):
            if (PROJECT / name).exists():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(PROJECT / name, checkout / name, follow_symlinks=False)
        subprocess.run(["chown", "-R", USER, root / HOME], check=True)
        yield root
    finally:
        shutil.rmtree(root)


def pasted(root: Path, command: str) -> str:
    """What a command of the README prints, pasted into the checkout by a user who is not root."""
    assert f"```\n{command}\n```" in README
    inside = f"cd ~/checkout && {command}"
    # The network, and how pip reaches it, are those of whoever runs the tests.
    here = [path for path in ("/dev", "/etc/resolv.conf", *SETTINGS) if Path(path).exists()]
    mounts = [f"mount --rbind {path} {root}{path}" for path in here]
    mounted = " && ".join([*mounts, f"mount -t proc proc {root}/proc"])
    entered = f'exec chroot --userspec={USER} {root} bash -c "$1"'
    kept = ("PIP_", "UV_", "SSL_", "DEMO_")
    done = subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("bash", "-c", f"{mounted} && {entered}", "bash", inside),
        ],
        env={name: value for name, value in os.environ.items() if name.startswith(kept)}
        | {"HOME": f"/{HOME}", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


def test_simulated_ranks_need_no_package_that_the_readme_does_not_name(bare: Path) -> None:
    said = pasted(bare, "make demo-simulated")
    assert "sglang_weight_updates_total" in said
    assert "It ends here" in said  # Nothing waits for a Ctrl-C that nobody can type.
