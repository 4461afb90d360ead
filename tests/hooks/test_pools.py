# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""KV pools of every class that can be built on a CPU, from SGLang's own code in both releases of
CI, against the sum of the tensors that torch made for them.

Models with most of these pools do not run without several GPUs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import PREFIX, Installation
from waiting import LIMIT

from sglang_weight_exporter.runners.pools import kv_storages, kv_usage

#: Pool → the labels of its parts, and the releases of CI that have it.
BOTH = frozenset({"oldest", "newest"})
NEWEST, OLDEST = frozenset({"newest"}), frozenset({"oldest"})
POOLS: dict[str, tuple[set[str], frozenset[str]]] = {
    "mha": ({"full"}, BOTH),
    "mha_fp4": ({"full"}, BOTH),
    "mha_mxfp8": ({"full"}, NEWEST),
    "mha_keys_only": ({"full"}, NEWEST),
    "mha_no_op": ({"full"}, NEWEST),
    "double_sparse": ({"full"}, OLDEST),
    "mla": ({"full"}, BOTH),
    "mla_fp4": ({"full"}, BOTH),
    "sparse_attention": ({"full", "index"}, BOTH),
    "sparse_attention_hisparse": ({"full", "index"}, NEWEST),
    "sparse_attention_layer_split": ({"full", "index"}, NEWEST),
    "mha_page_interleave": ({"full"}, NEWEST),
    "mla_page_interleave": ({"full"}, NEWEST),
    "sparse_attention_page_interleave": ({"full", "index"}, NEWEST),
    "swa": ({"full", "swa"}, BOTH),
    "mamba": ({"mamba"}, BOTH),
    "mamba_speculative": ({"mamba"}, BOTH),
    "mamba_checkpoints": ({"mamba"}, NEWEST),
    "hybrid_linear": ({"full", "mamba"}, BOTH),
    "qsa": ({"full", "index", "mamba"}, NEWEST),
    "minimax": ({"full", "index"}, NEWEST),
    "minimax_hisparse": ({"full", "index"}, NEWEST),
    "minimax_nvfp4": ({"full", "index"}, NEWEST),
    "ngram": ({"ngram"}, NEWEST),
    "short_conv": ({"mamba"}, NEWEST),
    "deepseek_v4": ({"swa", "c4", "c128", "index", "compress_state"}, NEWEST),
    "unified": ({"unified"}, NEWEST),
}

#: What SGLang leaves out of the size that it reports; of the others it reports all.
SGLANG_REPORTS: dict[str, set[str]] = {
    "hybrid_linear": {"full"},
    "qsa": {"full", "index"},
}
#: It leaves out scales, layers that another rank owns, and the scratch where pages of several ranks
#: come together; and the placeholders of a pool that keeps nothing.
SGLANG_REPORTS_LESS = {
    ("mla_fp4", "oldest"),
    ("mla_fp4", "newest"),
    ("mha_fp4", "oldest"),
    ("minimax_nvfp4", "newest"),
    ("sparse_attention_layer_split", "newest"),
    ("mha_page_interleave", "newest"),
    ("mla_page_interleave", "newest"),
    ("sparse_attention_page_interleave", "newest"),
}
SGLANG_REPORTS_NOTHING = {("mha_no_op", "newest")}


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, checkpoints: tuple[Path, Path]) -> dict[str, Any]:
    """What each release built, by its fixture's name."""
    running = {}
    with tempfile.TemporaryDirectory() as directory:
        ours = [item for item in request.session.items if item.path == Path(__file__)]
        asked = {item.callspec.params["release"] for item in ours if hasattr(item, "callspec")}
        for release in sorted(asked):
            installation: Installation = request.getfixturevalue(release)
            script = Path(__file__).with_name("build_pools.py")
            running[release] = subprocess.Popen(
                [installation.python, script, checkpoints[0], Path(directory) / release],
                env=installation.environment(**{PREFIX + "DISABLED": "1"}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        found: dict[str, Any] = {}
        for release, process in running.items():
            output, _ = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, output[-6000:]
            found[release] = json.loads((Path(directory) / release).read_text())
        return found


def case(release: str, *name: str) -> Any:
    return pytest.param(release, *name, marks=[pytest.mark.release("oldest")] * (release in OLDEST))


CASES = [case(release, name) for name, (_, having) in POOLS.items() for release in sorted(having)]


@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_pool_is_the_sum_of_its_tensors(
    built: Mapping[str, Any], release: str, name: str
) -> None:
    pool = built[release][name]
    if "NVIDIA" in pool.get("error", ""):
        pytest.skip(f"{name} of this release needs a GPU: {pool['error']}")
    assert "error" not in pool, pool["error"]
    assert pool["pools"].keys() == POOLS[name][0]
    assert sum(pool["pools"].values()) == pool["alive"] - pool["bookkeeping"]
    assert min(pool["pools"].values()) > 0


@pytest.mark.parametrize(("release", "name"), CASES)
def test_a_pool_is_what_sglang_says(built: Mapping[str, Any], release: str, name: str) -> None:
    pool = built[release][name]
    says = pool.get("sglang")
    if says is None:
        assert "error" in pool or name in SAYS_NOTHING, f"SGLang has no size of {name}"
        return
    reported = sum(
        nbytes
        for label, nbytes in pool["pools"].items()
        if label in SGLANG_REPORTS.get(name, POOLS[name][0])
    )
    if (name, release) in SGLANG_REPORTS_NOTHING:
        assert says == 0
    elif (name, release) in SGLANG_REPORTS_LESS:
        assert 0 < says < reported
    else:
        assert says == reported


#: Pools whose size SGLang does not report.
SAYS_NOTHING = {
    "double_sparse",
    "mamba",  # until 0.5.16
    "mamba_checkpoints",
    "ngram",
    "short_conv",
    "deepseek_v4",
    "unified",
}


@pytest.mark.parametrize("release", [case(release) for release in sorted(BOTH)])
def test_a_release_lacks_only_pools_that_it_should(built: Mapping[str, Any], release: str) -> None:
    lacking = {
        name
        for name, pool in built[release].items()
        if pool.get("error", "").startswith(("AttributeError", "ImportError", "ModuleNotFound"))
    }
    assert lacking == {name for name, (_, having) in POOLS.items() if release not in having}


# With the pools of SGLang that reserve addresses for more than they have memory for; CUDA only.


class KvVmmBufferOwner:
    """Of 0.5.16 and later: ``finalize`` backs more of what was reserved."""

    def __init__(self, reserved: int) -> None:
        self.tensors = [torch.empty(reserved, dtype=torch.uint8) for _ in range(2)]
        self.backed_bytes = 64


KvVmmBufferOwner.__module__ = "sglang.srt.mem_cache.kv_vmm_backing"


def test_a_pool_that_reserves_addresses_has_the_bytes_that_are_backed() -> None:
    owner = KvVmmBufferOwner(4096)
    pool = SimpleNamespace(
        k_buffer=[owner.tensors[0]],
        v_buffer=[owner.tensors[1][:16]],
        _post_capture_owner=owner,
    )
    runner = SimpleNamespace(token_to_kv_pool=pool, max_total_num_tokens=100)

    def measured() -> list[tuple[str, int, int | None]]:
        usage = kv_usage(runner, kv_storages(runner) or [])
        return [(part.pool, part.nbytes, part.tokens) for part in usage]

    assert measured() == [("full", 64, 100)]
    owner.backed_bytes = 6000
    runner.max_total_num_tokens = 50
    assert measured() == [("full", 6000, 50)]


def test_a_draft_counts_no_pool_of_the_target_again() -> None:
    pool = SimpleNamespace(k_buffer=[torch.empty(64)], v_buffer=[torch.empty(64)])
    own = SimpleNamespace(k_buffer=[torch.empty(16)], target=pool.k_buffer)
    of_target = kv_storages(SimpleNamespace(token_to_kv_pool=pool)) or []
    assert [storage.nbytes for storage in of_target] == [64 * 4] * 2
    counted = {storage.address for storage in of_target}
    of_draft = kv_storages(SimpleNamespace(token_to_kv_pool=own), counted) or []
    assert [storage.nbytes for storage in of_draft] == [16 * 4]


def test_no_pool_yet_is_not_an_empty_one() -> None:
    assert kv_storages(SimpleNamespace(token_to_kv_pool=None)) is None
