# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""`run`, `install` and `uninstall`: the hooks in a Python that has no such package."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engines import Installation, clean_environment
from waiting import LIMIT

from sglang_weight_exporter.cli.run import START_PATH

ARMED = "import sys; print('PostImportHook' in [type(f).__name__ for f in sys.meta_path])"
#: What an engine imports last; its class is wrapped when the hooks work.
HOOKED = (
    "from sglang.srt.model_executor.model_runner import ModelRunner;"
    "print(hasattr(ModelRunner.load_model, '__sglang_weight_exporter__'))"
)


def cli(
    *arguments: object, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_weight_exporter", *map(str, arguments)],
        env=environ or clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def output(command: Sequence[object], environ: dict[str, str] | None = None) -> str:
    ran = subprocess.run(
        list(map(str, command)),
        env=environ or clean_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A Python with nothing installed."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


@pytest.fixture
def with_sglang(tmp_path: Path, newest: Installation) -> Path:
    """A Python with SGLang and everything else that this environment has, less this package."""
    venv.create(tmp_path / "sglang", symlinks=True)
    for path in site_of(newest.python).iterdir():
        if "sglang_weight_exporter" not in path.name and path.suffix != ".pth":
            target = site_of(tmp_path / "sglang" / "bin" / "python") / path.name
            if not target.exists():
                target.symlink_to(path)
    return tmp_path / "sglang" / "bin" / "python"


def site_of(python: Path) -> Path:
    (site,) = python.parent.parent.glob("lib/python3.*/site-packages")
    return site


def entries(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name != "__pycache__"}


class TestRun:
    def test_each_python_of_the_command_is_armed(self, bare: Path) -> None:
        child = f"import subprocess; {ARMED}; subprocess.run([sys.executable, '-c', {ARMED!r}])"
        ran = cli("run", "--", bare, "-c", child)
        assert ran.stdout.split() == ["True", "True"], ran.stderr

    def test_a_process_that_python_spawns_is_armed(self, bare: Path, tmp_path: Path) -> None:
        program = tmp_path / "spawns.py"
        program.write_text(
            "import multiprocessing\n"
            f"def child():\n    {ARMED}\n"
            "if __name__ == '__main__':\n"
            "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
            "    process.start(); process.join()\n"
        )
        assert cli("run", "--", bare, program).stdout.split() == ["True"]

    def test_nothing_else_of_our_environment_can_be_imported(self, bare: Path) -> None:
        program = (
            "import sys, importlib.util as u, sglang_weight_exporter as w\n"
            "print(u.find_spec('msgspec'), u.find_spec('pytest'))\n"
            "print([p for p in sys.path if 'start_path' in p or p == sys.argv[1]])\n"
        )
        parent = Path(__file__).parents[2]
        ran = cli("run", "--", bare, "-c", program, parent)
        assert ran.stdout.splitlines() == ["None None", "[]"], ran.stderr

    def test_a_sitecustomize_that_was_there_is_run_too(self, bare: Path, tmp_path: Path) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.ours_too = 'yes'\n")
        environ = clean_environment(PYTHONPATH=str(tmp_path / "site"))
        program = f"{ARMED}; import sitecustomize; print(sys.ours_too, sitecustomize.__file__)"
        ran = cli("run", "--", bare, "-c", program, environ=environ)
        assert ran.stdout.split() == ["True", "yes", str(tmp_path / "site" / "sitecustomize.py")]

    def test_behind_a_sitecustomize_that_runs_no_other(self, tmp_path: Path) -> None:
        """Python looks for a usercustomize as well, where a user's packages may be used."""
        venv.create(tmp_path / "user", symlinks=True, system_site_packages=True)
        python = tmp_path / "user" / "bin" / "python"
        for directory in ("front", "behind"):
            (tmp_path / directory).mkdir()
        (tmp_path / "front" / "sitecustomize.py").write_text("import sys; sys.first = 1\n")
        (tmp_path / "behind" / "usercustomize.py").write_text("import sys; sys.other = 2\n")
        paths = (tmp_path / "front", START_PATH, tmp_path / "behind")
        environ = clean_environment(PYTHONPATH=os.pathsep.join(map(str, paths)))
        program = f"{ARMED}; print(sys.first, sys.other, {str(START_PATH)!r} in sys.path)"
        assert output([python, "-c", program], environ).split() == ["True", "1", "2", "False"]

    def test_behind_the_opentelemetry_operator_s(self, bare: Path, tmp_path: Path) -> None:
        """It puts its own directory in front of PYTHONPATH, and its packages behind it."""
        there = pytest.importorskip(
            "opentelemetry.instrumentation.auto_instrumentation", reason="comes with `make test`"
        ).__path__[0]
        paths = (there, START_PATH, Path(there).parents[2])
        environ = clean_environment(
            PYTHONPATH=os.pathsep.join(map(str, paths)),
            **{f"OTEL_{each}_EXPORTER": "none" for each in ("TRACES", "METRICS", "LOGS")},
        )
        ran = subprocess.run([bare, "-c", ARMED], env=environ, capture_output=True, text=True)
        assert (ran.stdout.split(), ran.stderr) == (["True"], "")

    def test_a_sitecustomize_that_fails_fails_as_it_did(self, bare: Path, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('broken')\n")
        environ = clean_environment(PYTHONPATH=str(tmp_path))
        ran = cli("run", "--", bare, "-c", ARMED, environ=environ)
        assert ran.stdout.split() == ["True"]
        assert "broken" in ran.stderr

    def test_switched_off_it_starts_the_command_and_arms_nothing(self, bare: Path) -> None:
        environ = clean_environment(SGLANG_WEIGHT_EXPORTER_DISABLED="1")
        ran = cli("run", "--", bare, "-c", ARMED, environ=environ)
        assert (ran.stdout.split(), ran.stderr) == (["False"], "")

    def test_it_becomes_the_command(self) -> None:
        program = "echo $$; exit 7"
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_weight_exporter", "run", "--", "sh", "-c", program],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.communicate(timeout=LIMIT)[0].split() == [str(process.pid)]
        assert process.returncode == 7

    def test_a_command_that_is_not_there_is_said(self) -> None:
        ran = cli("run", "--", "no-such-command")
        assert (ran.returncode, ran.stdout) == (127, "")
        assert "no-such-command cannot be started: No such file" in ran.stderr
        assert cli("run").returncode == 2

    @pytest.mark.release("launches")
    def test_sglang_is_hooked(self, with_sglang: Path, newest: Installation) -> None:
        ran = cli("run", "--", with_sglang, "-c", HOOKED, environ=newest.environment())
        assert ran.stdout.split()[-1:] == ["True"], ran.stderr[-3000:]


class TestInstall:
    @pytest.mark.release("launches")
    def test_sglang_is_hooked_until_uninstall(
        self, with_sglang: Path, newest: Installation
    ) -> None:
        before = entries(site_of(with_sglang))
        installed = cli("install", "--python", with_sglang)
        assert installed.returncode == 0, installed.stderr
        assert "SGLang 0.5.23 is hooked from its next start on" in installed.stdout
        assert "a virtual environment" in installed.stdout
        assert entries(site_of(with_sglang)) - before == {
            "sglang_weight_exporter.pth",
            "sglang_weight_exporter.start",
            "sglang_weight_exporter.path",
        }
        assert output([with_sglang, "-c", HOOKED], newest.environment()).split()[-1] == "True"
        # The exporter process is started like this, from a directory that is not ours.
        served = output([with_sglang, "-m", "sglang_weight_exporter", "--version"])
        assert served.count(".") == 2
        again = cli("install", "--python", with_sglang)
        assert again.returncode == 0, again.stderr
        removed = cli("uninstall", "--python", with_sglang)
        assert removed.returncode == 0, removed.stderr
        assert entries(site_of(with_sglang)) == before
        assert output([with_sglang, "-c", ARMED]) == "False"

    def test_uninstall_leaves_the_package_that_it_linked_to(self, with_sglang: Path) -> None:
        import sglang_weight_exporter

        package = Path(sglang_weight_exporter.__file__).parent
        before = entries(package)
        assert cli("install", "--python", with_sglang).returncode == 0
        assert cli("uninstall", "--python", with_sglang).returncode == 0
        assert entries(package) == before

    def test_what_sglang_would_have_brought_along_is_named(self, bare: Path) -> None:
        before = entries(site_of(bare))
        ran = cli("install", "--python", bare)
        assert ran.returncode == 1
        assert "lacks msgspec, prometheus-client, uvicorn, nvidia-ml-py" in ran.stderr
        assert entries(site_of(bare)) == before

    def test_an_environment_where_pip_has_installed_it_is_left_alone(
        self, newest: Installation
    ) -> None:
        before = entries(site_of(newest.python))
        for command, words in (("install", "installed in"), ("uninstall", "pip uninstall")):
            ran = cli(command, "--python", newest.python)
            assert ran.returncode == 1
            assert words in ran.stderr
            assert "nothing was changed" in ran.stderr
        assert entries(site_of(newest.python)) == before

    def test_what_pip_installed_later_stays(self, with_sglang: Path) -> None:
        site = site_of(with_sglang)
        assert cli("install", "--python", with_sglang).returncode == 0
        (site / "sglang_weight_exporter-0.1.0.dist-info").mkdir()  # As pip would have.
        (site / "sglang_weight_exporter.pth").write_text("# pip's\n")
        assert cli("uninstall", "--python", with_sglang).returncode == 0
        assert (site / "sglang_weight_exporter.pth").read_text() == "# pip's\n"
        assert not (site / "sglang_weight_exporter.path").exists()

    def test_a_relative_path_is_one_of_here(self, with_sglang: Path) -> None:
        site = site_of(with_sglang)
        before = entries(site)
        here = with_sglang.parent
        for command, armed in (("install", "True"), ("uninstall", "False")):
            for python in ("./python", os.path.relpath(with_sglang, here.parent)):
                cwd = here if python.startswith("./") else here.parent
                ran = subprocess.run(
                    [sys.executable, "-m", "sglang_weight_exporter", command, "--python", python],
                    env=clean_environment(),
                    cwd=cwd,
                    capture_output=True,
                    text=True,
                )
                assert "Traceback" not in ran.stderr
            assert output([with_sglang, "-c", ARMED]) == armed
        assert entries(site) == before

    @pytest.mark.parametrize("python", ["/no/such/python", "/bin/true", "/bin/false"])
    def test_what_is_no_python_is_said(self, python: str) -> None:
        ran = cli("install", "--python", python)
        assert ran.returncode == 1
        assert f"{python} could not be started as a Python" in ran.stderr

    def test_files_that_do_not_work_are_taken_out_again(self, with_sglang: Path) -> None:
        site = site_of(with_sglang)
        (site / "sglang_weight_exporter.py").write_text("raise ImportError('another module')\n")
        before = entries(site)
        ran = cli("install", "--python", with_sglang)
        assert ran.returncode == 1
        assert "did not work" in ran.stderr
        assert entries(site) == before

    def test_an_exporter_that_cannot_start_there_is_said(self, with_sglang: Path) -> None:
        site = site_of(with_sglang)
        (site / "prometheus_client").unlink()
        (site / "prometheus_client.py").write_text("raise ImportError('of another release')\n")
        before = entries(site)
        ran = cli("install", "--python", with_sglang)
        assert ran.returncode == 1
        assert "serves no metrics there (ImportError: of another release)" in ran.stderr
        assert entries(site) == before

    def test_what_sglang_itself_brings_is_enough(self, with_sglang: Path) -> None:
        site = site_of(with_sglang)
        for name in ("bcrypt", "yaml", "grpc", "opentelemetry"):
            if (site / name).exists():
                (site / name).unlink()
        ran = cli("install", "--python", with_sglang)
        assert ran.returncode == 0, ran.stderr

    @pytest.fixture
    def read_only(self, with_sglang: Path) -> Iterator[Path]:
        """Root may write whatever the mode: only a read-only mount is read-only for everybody."""
        site = str(site_of(with_sglang))
        if subprocess.run(["mount", "--bind", site, site], check=False).returncode != 0:
            pytest.skip("needs a machine that lets root mount")
        subprocess.run(["mount", "-o", "remount,ro,bind", site], check=True)
        yield with_sglang
        subprocess.run(["umount", "-l", site], check=True)

    def test_without_permission_nothing_is_changed_and_run_is_named(self, read_only: Path) -> None:
        before = entries(site_of(read_only))
        ran = cli("install", "--python", read_only)
        assert ran.returncode == 1
        assert "Read-only file system" in ran.stderr
        assert "sglang-weight-exporter run --" in ran.stderr
        assert entries(site_of(read_only)) == before
        assert output([read_only, "-c", "pass"]) == ""
        assert os.access(read_only, os.X_OK)
