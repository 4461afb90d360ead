# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the zoo has seen, as a document and as what `verify` takes for proved.

`document.py RESULTS` puts the results of a run of `load_models.py` into ``seen.json`` beside this
file and writes ``docs/models.md`` and ``confirmed_loaders.json`` anew from all of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SEEN = Path(__file__).with_name("seen.json")
PAGE = ROOT / "docs" / "models.md"
CONFIRMED = ROOT / "sglang_weight_exporter" / "verification" / "confirmed_loaders.json"
STEPS = {
    "load": "the load",
    "the same": "a reload of the same",
    "another": "a reload of another checkpoint",
    "resume": "release and resume",
    "tokens": "four tokens",
    "adapter": "an adapter in",
    "without": "the adapter out",
}

HEAD = """\
# Models

Tiny random checkpoints in real ranks, made and loaded by `tests/zoo`, which writes this page: each
is loaded, read again from the same checkpoint, read from another one, and makes four tokens. After
each step the bytes that the exporter gives are those of the unique storages, no tensor has moved
that did not, none holds other bytes than the step left in it, and `verify --checkpoint` calls none
different.

*Equal* is the share of a rank's bytes that `verify --checkpoint` finds in the file; the rest cannot
be compared, because the loader does more than the rules know ([fingerprints](fingerprint.md)).
*Proved* is how many names of tensors, layers taken together, may be called different with this
release on this device. `verify --manifest` with a [reference](fingerprint.md#references) compares
all of them, for every model.

*Sent* is the share of a rank's bytes that a [manifest](rl.md) of what a trainer would have sent
proves: all tensors of the file, under their names there. After each step nothing is called
different, no tensor is missing that is there, and each that is equal is named where the manifest
has another one in its place. The rest is made of what was sent in a way that no layer of SGLang
says.

A model with `:2` is two tensor-parallel ranks, with `+fp8` quantized as it is loaded, with `+awq`
and `+gptq` from a checkpoint that is quantized so. With `+lora` it is loaded with room for
adapters: one is put in, makes four tokens, and is taken out, in place of the reloads. With `+eagle`
and `+mtp` it is the draft beside the model, with a checkpoint of its own and in the model's.
"""


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in every run."""
    if "error" in results:
        return {"error": results["error"]}
    load = results["steps"]["load"]
    return {
        "architecture": results["architecture"],
        "class": results["class"],
        "equal": load["equal"],
        "not_comparable": load["not_comparable"],
        "equal_bytes": load["equal_bytes"],
        **_summary_of_sent(load),
        "derived": results["derived"],
        "quantization": results["quantization"],
        "problems": results["problems"],
        "confirmed": results["confirmed"],
        "unconfirmed": results["unconfirmed"],
    }


def _summary_of_sent(load: Mapping[str, Any]) -> dict[str, Any]:
    sent = load.get("sent")  # Nobody sends a draft.
    return {"sent": sent["equal_bytes"], "unheld": sent["unheld"]} if sent else {}


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """By model; of several ranks what holds of all."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.json")):
        name, _, rank = path.stem.partition("-")
        results = json.loads(path.read_bytes())
        model = name + (":2" if rank else "")
        found[model] = _together(found[model], results) if model in found else results
    return found


def _together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    if "error" in one or "error" in other:
        return one if "error" in one else other
    together = {**one, "steps": dict(one["steps"])}
    for name in one["steps"].keys() & other["steps"].keys():
        steps = one["steps"][name], other["steps"][name]
        least = min(steps, key=lambda step: step["equal"])
        together["steps"][name] = least
        if "sent" in least:
            sent = _sent_together(*(step["sent"] for step in steps))
            together["steps"][name] = {**least, "sent": sent}
    unconfirmed: dict[str, list[str]] = {}
    confirmed: dict[str, list[str]] = {}
    together |= {"unconfirmed": unconfirmed, "confirmed": confirmed}
    for kind in ("whole", "shares"):
        bad = {*one["unconfirmed"][kind], *other["unconfirmed"][kind]}
        good = {*one["confirmed"][kind], *other["confirmed"][kind]} - bad
        unconfirmed[kind], confirmed[kind] = sorted(bad), sorted(good)
    return together


def _sent_together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What no rank holds or names, and what any calls different."""
    return {
        **min(one, other, key=lambda sent: float(sent["equal_bytes"])),
        **{name: sorted({*one[name]} & {*other[name]}) for name in ("unheld", "unnamed")},
        **{name: sorted({*one[name], *other[name]}) for name in ("different", "unsent")},
    }


def confirmed(seen: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns of names that were what the rules make, in every model of an architecture."""
    found: dict[str, Any] = {}
    for release, devices in sorted(seen.items()):
        for device, models in sorted(devices.items()):
            loaders: dict[tuple[str, str], Any] = {}
            for model in models.values():
                if "error" not in model:
                    key = model["architecture"], model["quantization"]
                    loader = loaders.setdefault(key, {})
                    for kind in ("whole", "shares"):
                        good, bad = loader.setdefault(kind, (set(), set()))
                        good.update(model["confirmed"].get(kind, ()))
                        bad.update(model["unconfirmed"].get(kind, ()))
            proved: dict[str, Any] = found.setdefault(release, {}).setdefault(device, {})
            for (architecture, quantization), sets in sorted(loaders.items()):
                if any(good - bad for good, bad in sets.values()):
                    proved.setdefault(architecture, {})[quantization] = {
                        kind: sorted(good - bad) for kind, (good, bad) in sets.items()
                    }
    return found


def page(seen: Mapping[str, Any]) -> str:
    lines = [HEAD]
    proved = confirmed(seen)
    for release, devices in sorted(seen.items()):
        for device, models in sorted(devices.items()):
            ran = {name: model for name, model in models.items() if "error" not in model}
            where = "a CPU" if device == "cpu" else device
            lines += [f"## SGLang {release} on {where}", ""]
            lines += ["| model | architecture | equal | proved | sent | not done, and why |"]
            lines += ["|---|---|---|---|---|---|"]
            for name, model in sorted(ran.items()):
                loader = (
                    proved[release][device]
                    .get(model["architecture"], {})
                    .get(model["quantization"], {})
                )
                kind = "shares" if name.endswith(":2") else "whole"
                problems = "; ".join(
                    f"{STEPS[step]}: `{why}`" for step, why in model["problems"].items()
                )
                through = model["class"]
                architecture = model["architecture"] + (
                    f" (as {through})" if through != model["architecture"] else ""
                )
                sent = f"{model['sent']:.1%}" if "sent" in model else ""
                lines.append(
                    f"| {name} | {architecture} | {model['equal_bytes']:.1%} "
                    f"| {len(loader.get(kind, ()))} | {sent} | {problems} |"
                )
            lines += ["", "Not loaded there:", ""]
            lines += [
                f"- {name}: `{model['error']}`"
                for name, model in sorted(models.items())
                if "error" in model
            ]
            lines += [""]
    return "\n".join(lines)


def write(seen: Mapping[str, Any]) -> None:
    SEEN.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")
    CONFIRMED.write_text(json.dumps(confirmed(seen), indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(seen))


def main() -> None:
    results = read_results(Path(sys.argv[1]))
    loaded = next(each for each in results.values() if "error" not in each)
    seen = json.loads(SEEN.read_bytes()) if SEEN.exists() else {}
    models = seen.setdefault(loaded["release"], {}).setdefault(loaded["device"], {})
    models |= {name: summary(each) for name, each in results.items()}
    write(seen)


if __name__ == "__main__":
    main()
