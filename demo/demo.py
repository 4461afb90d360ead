# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A real SGLang engine with the exporter beside it: run by `make demo`.

Writes two tiny checkpoints, starts SGLang on a GPU where there is one and on the CPU otherwise,
reloads its weights once, and shows what a scrape says before and after. With `--simulated`, run by
`make demo-simulated`, the ranks do not exist and nothing of SGLang is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "shared"))

import tiny_model
from engines import Engine, Installation, Scrape, clean_environment
from ports import free_port
from waiting import eventually

TERMINAL = sys.stdout.isatty()
PORT, EXPORTER_PORT = 30000, 9400
ENDS = "\n  It ends here; on a terminal, and without --exit, it stays until Ctrl-C."
SHOWN: tuple[tuple[str, dict[str, str], str], ...] = (
    ("sglang_weight_bytes", {"kind": "parameter"}, "bytes of parameters"),
    ("sglang_weight_tensors", {"kind": "parameter"}, "tensors"),
    ("sglang_kv_pool_bytes", {}, "bytes of KV pool"),
    ("sglang_kv_pool_tokens", {}, "tokens that fit in it"),
    ("sglang_weight_updates_total", {"source": "disk"}, "updates from disk"),
    ("sglang_weight_update_failures_total", {"source": "disk"}, "failed ones"),
    ("sglang_weight_last_update_timestamp_seconds", {}, "last change of the weights"),
)


def styled(code: str, text: str) -> str:
    """`text` with a terminal style, plain where output is not a terminal."""
    return f"\033[{code}m{text}\033[0m" if TERMINAL else text


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """One line for one step: on a terminal it counts the seconds, and says how long it took."""
    done, started = threading.Event(), time.monotonic()
    outcome = styled("31", "failed")

    def count() -> None:
        while not done.wait(0.5):
            print(f"\r  {title:<58} {time.monotonic() - started:4.0f} s", end="", flush=True)

    print(f"  {title:<58}", end="", flush=True)
    counter = threading.Thread(target=count, daemon=True)
    if TERMINAL:
        counter.start()
    try:
        yield
        outcome = styled("32", "done")
    finally:
        done.set()
        if TERMINAL:
            counter.join()
            print(f"\r  {title:<58}", end="")
        print(f" {time.monotonic() - started:4.0f} s  {outcome}", flush=True)


def gpu_here() -> bool:
    """Whether there is an NVIDIA GPU and its driver."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def port_or_free(port: int, *, engine: bool = False) -> int:
    """The usual port when nobody has it, whether he answers or not; another one otherwise."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return free_port(engine=engine)
    return port


def table(before: Scrape, after: Scrape, **of: str) -> str:
    """The metrics of SHOWN, before and after, of the ranks with these labels."""

    def shown(value: float, name: str) -> str:
        if name.endswith("_timestamp_seconds"):
            return time.strftime("%H:%M:%S", time.localtime(value))
        return f"{value:,.0f}"

    rows = [("", "before", "after", "")]
    for name, labels, meaning in SHOWN:
        series = name + "".join(f'{{{key}="{value}"}}' for key, value in labels.items())
        old, new = (shown(scrape.sum(name, **labels, **of), name) for scrape in (before, after))
        rows.append((series, old, new, meaning))
    lines = []
    for series, old, new, meaning in rows:
        line = f"  {series:<54} {old:>14} {new:>14}  {meaning}"
        lines.append(styled("1", line) if old != new and series else line)
    return "\n".join(lines)


def show(directory: Path, *, stay: bool) -> None:
    """The whole demo; stays up until Ctrl-C with `stay`."""
    gpu = gpu_here()
    with step("Writing two tiny checkpoints"):
        first = tiny_model.write(directory / "first", 0)
        second = tiny_model.write(directory / "second", 1)

    engine = Engine(
        Installation(Path(sys.executable), gpu=gpu),
        first,
        port=port_or_free(PORT, engine=True),
        exporter_port=port_or_free(EXPORTER_PORT),
    )
    try:
        where = "the GPU" if gpu else "the CPU (it imports for a minute)"
        engine.start()
        with step(f"Starting SGLang {sglang_name()} on {where}"):
            engine.wait_until_ready()
            before = eventually(engine.scrape)
        with step("Reloading its weights from the second checkpoint"):
            status, answer = engine.update_weights_from_disk(second)
            if status != 200:
                raise AssertionError(f"SGLang refused the reload: {answer}")

            def reloaded() -> Scrape:
                scrape = engine.scrape()
                assert scrape.sum("sglang_weight_updates_total", source="disk") == 1
                return scrape

            after = eventually(reloaded)
        print(f"\n{table(before, after)}\n")
        print(f"  Metrics   {styled('36', engine.exporter_url + '/metrics')}")
        print(f"  SGLang    {styled('36', engine.url)}")
        if stay:
            print(f"  Its log   {engine.log_file}")
            print("  Reload    " + reload_command(engine, first))
            print(f"\n  {styled('1', 'Ctrl-C')} stops everything.", flush=True)
            wait_for_signal(engine)
        else:
            print(ENDS)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing may be left behind
        with step("Stopping SGLang and the exporter"):
            engine.stop()


def show_simulated(*, stay: bool) -> None:
    """The same of ranks that do not exist; stays up until Ctrl-C with `stay`."""
    port = port_or_free(EXPORTER_PORT)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "sglang_weight_exporter", "serve", "--simulate", "4x8"]
    process = subprocess.Popen(
        [*command, "--address", "127.0.0.1", "--port", str(port)],
        # Where to send traces and metrics stays as the user has it.
        env=clean_environment() | {k: v for k, v in os.environ.items() if k.startswith("OTEL_")},
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process to pass on.
    )
    first = {"engine": "30000", "tp_rank": "0"}

    def loaded() -> Scrape:
        scrape = Scrape.of(f"{url}/metrics")
        assert scrape.one("sglang_weight_exporter_build_info", simulated="true") == 1
        assert scrape.one("sglang_weight_exporter_ranks") == 32
        return scrape

    def updated() -> Scrape:
        scrape = Scrape.of(f"{url}/metrics")
        assert scrape.sum("sglang_weight_updates_total", source="disk", **first) == 1
        return scrape

    try:
        with step("Starting 4 engines of 8 ranks that do not exist"):
            before = eventually(loaded)
        with step("Waiting for the first version of the weights"):
            after = eventually(updated)
        print(f"\n{table(before, after, **first)}\n")
        print("  Of the first rank; nothing of it is measured. A new version comes every 30 s.")
        print(f"  Metrics   {styled('36', url + '/metrics')}")
        if stay:
            print(f"\n  {styled('1', 'Ctrl-C')} stops it.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                raise AssertionError(f"The exporter ended by itself with {process.wait()}")
        else:
            print(ENDS)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def sglang_name() -> str:
    """The release of SGLang in this environment."""
    from importlib.metadata import version

    return version("sglang")


def reload_command(engine: Engine, model: Path) -> str:
    """What to type in another terminal to see the counters move again."""
    return (
        f"curl {engine.url}/update_weights_from_disk -H 'Content-Type: application/json'"
        f' -d \'{{"model_path": "{model}"}}\''
    )


def wait_for_signal(engine: Engine) -> None:
    """Block until Ctrl-C, SIGTERM, or the engine's end, which is an error."""
    with contextlib.suppress(KeyboardInterrupt):
        code = engine.main.wait()
        raise AssertionError(f"SGLang ended by itself with {code}:\n{engine.log()[-3000:]}")


def main() -> int:
    """Run the demo; exit status 1 when something that it shows did not happen."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--exit",
        action="store_true",
        help="end after showing; the default without a terminal to type Ctrl-C in",
    )
    arguments.add_argument("--simulated", action="store_true", help="without SGLang")
    asked = arguments.parse_args()
    stay = not asked.exit and sys.stdin.isatty()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    beside = "32 simulated ranks" if asked.simulated else "a real SGLang"
    print(styled("1", f"\nsglang_weight_exporter beside {beside}\n"))
    with tempfile.TemporaryDirectory(prefix="sglang-weight-exporter-demo-") as directory:
        try:
            if asked.simulated:
                show_simulated(stay=stay)
            else:
                show(Path(directory), stay=stay)
        except KeyboardInterrupt:
            print("\n  Interrupted.")
            return 130
        except AssertionError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
