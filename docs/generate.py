# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the reference pages from the code: generate.py [--check]

``metrics.md`` and ``configuration.md`` say what the instruments and settings say of themselves.
With ``--check`` nothing is written, and a stale page is an error.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from asked_by import Askers, asked_by

from sglang_weight_exporter.export.instruments import GROUPS, INSTRUMENTS
from sglang_weight_exporter.export.instruments.base import Instrument
from sglang_weight_exporter.export.views import IDENTITY
from sglang_weight_exporter.records.updates import DURATION_BUCKETS, SOURCES
from sglang_weight_exporter.records.weights import CHANGES
from sglang_weight_exporter.settings import PREFIX, Settings

DIRECTORY = Path(__file__).parent

SECTIONS = {
    "Weights": ("sglang_weight_",),
    "KV pool and LoRA slots": ("sglang_kv_", "sglang_lora_"),
    "GPUs": ("sglang_gpu_",),
    "Memory of a rank": ("sglang_rank_memory_", "sglang_rank_out_of_memory"),
    "The exporter itself": ("sglang_weight_exporter_",),
}

METRICS = """\
# Metrics

Every metric on `/metrics`, as the code defines it. Names, types and labels are
[a contract](../UPGRADING.md#what-a-version-promises).

| question | begin with |
|---|---|
| How many bytes of weights and of KV pool are on which GPU? | `sglang_weight_bytes`, `sglang_kv_pool_bytes` |
| When did the weights last change, how often, by which path? | `sglang_weight_last_update_timestamp_seconds`, `sglang_weight_updates_total` |
| Did it work, and what did it cost? | `sglang_weight_update_failures_total`, `sglang_weight_update_duration_seconds`, `sglang_weight_update_paused_seconds_total` |
| Do all replicas serve the same? | `sglang_weight_version_hash`; byte for byte `sglang_weight_fingerprint` |
| How full is the GPU? | `sglang_gpu_memory_used_bytes`, `sglang_gpu_memory_total_bytes` |
| Can I trust this? | `sglang_weight_exporter_hooks`, `sglang_weight_exporter_ranks` |

Series of a rank carry these labels, the rank labels as SGLang's own metrics have them:

| label | value |
|---|---|
| `model_name` | SGLang's served model name |
| `engine` | the HTTP port in SGLang's settings; `-2`, `-3`… behind it for a further engine of this host with the same port |
| `role` | `target`, `draft`, or `draft_0`, `draft_1`… with several draft layers; `encoder` of an encoder server; `weight_cache` of a weight-cache daemon |
| `tp_rank`, `pp_rank`, `dp_rank`, `moe_ep_rank` | parallel ranks; empty where SGLang has none |
| `device` | torch's name in the rank's process: `cuda:0`, `cpu` |
| `gpu_uuid` | NVML's UUID with its prefix (`GPU-…`, `MIG-…`), which joins with dcgm-exporter's `UUID`; empty on a CPU |

`SGLANG_WEIGHT_EXPORTER_METRICS` chooses what is served and sent: a preset, or names of groups,
separated by commas; both together are both (`lean,memory`).

| preset | |
|---|---|
| `lean` | what the shipped panels and rules ask for: [all of them work](#who-asks-for-what) |
| `default` | besides, what nothing asks for and is seldom there or one a host (*in default*), and the exporter's own `process_*` |
| `full` | everything (*in full*), and all series of it. A group that is named is in full |

Short of that `sglang_weight_update_duration_seconds` has the buckets 1, 10 and 100,
`sglang_gpu_memory_bytes` what other processes have, where they have any, and of
`sglang_weight_exporter_hooks` only those that failed have a name. A scrape may choose another preset,
`/metrics?metrics=full`, and single metrics, `/metrics?name[]=NAME`, as often as there are names.

`source` is one of {sources}. `change` is one of {changes}. Counters exist at 0
before the first event where a rule needs that; those of operations, table changes, pauses and
phases come with it. What could not be read is absent and never 0. A rank that has died is gone
at the next scrape. In OpenMetrics, `sglang_weight_updates_total` and
`sglang_weight_update_duration_seconds` carry the `trace_id` of the last update's span as an
exemplar while spans are exported.
"""

COUNTING = """
## What counts as what

* **Bytes** are bytes of unique storages. A tied tensor, a view, and a draft model's share of the
  target's storages count once. torch's allocator rounds each block up (to 512 bytes on CUDA), so
  `torch.cuda.memory_allocated` is a little larger.
* **Kinds**: `parameter` and `buffer` are torch's; `derived` are weights that SGLang keeps as plain
  attributes of modules, in lists and dictionaries there too (latent attention's `w_kc` and `w_vc`,
  scales, repacked copies).
* **Resident** bytes fall while SGLang's memory saver has released them
  (`/release_memory_occupation`): addresses stay, physical memory is gone. What lies outside of the
  saver's regions stays (rotary embeddings), and so does what is not on a GPU. Without the memory
  saver that request does nothing, and the metric says so by not moving.
* **An update** is one `update_weights_from_disk` or `_ipc`, one begin/end session (SGLang 0.5.21
  and later), or one rebalance of experts. Before 0.5.21, updates from tensors or a process group
  have no end in SGLang: one ends with a request that asks for the cache to be flushed, with a
  changed weight version, when generation goes on, or after 10 seconds without a call. Clients that
  ask for a flush with every bucket are counted once a bucket.
* **Sources**: `disk`; `distributed` (a process group); `tensor` (tensors in a request); `ipc` (a
  checkpoint engine); `p2p` (a session in which nothing was loaded: a peer wrote into the tensors);
  `eplb` (experts moved, also where SGLang reads them from disk again); `external` (code that calls
  `record_update`, and `check_weights` with `reset_tensors`).
* **A failure** is an update that SGLang answered with an error or an exception. Whether the weights
  are unchanged or undefined afterwards is in the span and in `status`.
* **A version** is whatever string SGLang was given (`step-42`, a hash, `default`). It is no label,
  because it changes with every update. `sglang_weight_version_hash` is equal where the strings are
  equal and says nothing about which is newer; `sglang_weight_version` has the value where the
  string is an integer. The string itself is in `status`, in the span (`sglang.weights.version`) and
  in the table; from a panel, the exemplar of an update leads to its span.
* **Duration** is from the first call of an update to its last; buckets end at {buckets} s.
"""

CONFIGURATION = """\
# Configuration

Environment variables, read once: by SGLang's processes when SGLang is imported, by the exporter
process when it starts (it inherits the environment of the rank that starts it). A flag of the same
name wins where a command takes it (`--port`, `--runtime-dir`; see `COMMAND --help`). A value that
cannot be used is named in one log line, and the default is used.

| variable | default | meaning |
|---|---|---|
"""

CONFIGURATION_END = """
The runtime directory is `$XDG_RUNTIME_DIR/sglang-weight-exporter`, and where that is not set or
not writable `sglang-weight-exporter-UID` in the temporary directory. Engines, exporter and command
line must agree on it: a service started by a service manager often has another
`XDG_RUNTIME_DIR` than a login shell.

OpenTelemetry's own variables (`OTEL_EXPORTER_OTLP_ENDPOINT` and the others) keep their meaning;
see [OpenTelemetry](opentelemetry.md). SGLang's `SGLANG_PLUGINS`, an allow-list of plugins, is
respected: set without `sglang_weight_exporter`, nothing is hooked.
"""

DEFAULTS = {
    "disabled": "off",
    "metrics": "`default`",
    "fingerprint": "off",
    "address": "all interfaces",
    "serve": "`auto`",
    "runtime_dir": "see below",
    "table": "`span_events`",
    "span_table": "on",
}


def _family(instrument: Instrument) -> str:
    return f"{instrument.name}_total" if instrument.kind == "counter" else instrument.name


def _section(instrument: Instrument) -> str:
    # The longest prefix that fits: sglang_weight_exporter_ before sglang_weight_.
    fitting = {
        len(prefix): section
        for section, prefixes in SECTIONS.items()
        for prefix in prefixes
        if instrument.name.startswith(prefix)
    }
    return fitting[max(fitting)]


def _group(instrument: Instrument) -> str:
    (group,) = (name for name, instruments in GROUPS.items() if instrument in instruments)
    return group if instrument.preset == "lean" else f"{group}, in {instrument.preset}"


def metrics() -> str:
    """The page about metrics."""
    page = METRICS.format(
        sources=", ".join(f"`{source}`" for source in SOURCES),
        changes=", ".join(f"`{change}`" for change in CHANGES),
    )
    for section in SECTIONS:
        page += f"\n## {section}\n\n| metric | group | type | labels | meaning |\n|---|---|---|---|---|\n"
        for instrument in INSTRUMENTS:
            if _section(instrument) != section:
                continue
            labels = [f"`{label}`" for label in instrument.labels]
            if instrument.labels == IDENTITY:
                labels = ["identity"]
            elif instrument.read_role is not None:
                labels.insert(0, "identity")
            page += (
                f"| `{_family(instrument)}` | {_group(instrument)} | {instrument.kind}"
                f" | {', '.join(labels)}"
                f" | {instrument.description} |\n"
            )
    page += (
        "\nBeside them are prometheus_client's `process_*`: memory, processor time, descriptors and"
        "\nstart of the exporter process, not of an engine.\n"
    )
    page += ASKERS
    askers = asked_by({instrument.name for instrument in INSTRUMENTS})
    for instrument in INSTRUMENTS:
        page += _asked_by(instrument, askers[instrument.name])
    page += "\n*identity*: " + ", ".join(f"`{label}`" for label in IDENTITY) + ".\n"
    return page + COUNTING.format(buckets=", ".join(f"{bound:g}" for bound in DURATION_BUCKETS))


ASKERS = """
## Who asks for what

Panels of the boards *SGLang engine* and *SGLang fleet*, alerts, and recorded series that need a metric,
also where they come to it through a recorded series.

| metric | group | engine board | fleet board | alerts | recorded |
|---|---|---|---|---|---|
"""


def _asked_by(instrument: Instrument, askers: Askers) -> str:
    alerts = (f"[{name}](alerts.md#{name.lower()})" for name in askers.alerts)
    recorded = (f"`{name}`" for name in askers.recorded)
    columns = (askers.engine, askers.fleet, alerts, recorded)
    cells = "".join(f" | {', '.join(column)}" for column in columns)
    return f"| `{_family(instrument)}` | {_group(instrument)}{cells} |\n"


def configuration() -> str:
    """The page about settings."""
    page = CONFIGURATION
    for setting in fields(Settings):
        default = DEFAULTS.get(setting.name) or (
            "unset" if setting.default in (None, "") else f"{setting.default:.15g}"
        )
        variable = PREFIX + setting.name.upper()
        page += f"| `{variable}` | {default} | {setting.metadata['description']} |\n"
    return page + CONFIGURATION_END


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether pages are stale")
    check = parser.parse_args().check
    stale = []
    for name, text in {"metrics.md": metrics(), "configuration.md": configuration()}.items():
        path = DIRECTORY / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale.append(name)
        else:
            path.write_text(text, encoding="utf-8")
            print(path)
    if stale:
        print(
            f"Stale: {', '.join(stale)}. The code says something else now; "
            "run `python docs/generate.py` and commit what it writes.",
            file=sys.stderr,
        )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
