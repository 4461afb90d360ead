# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a CPU's weights are packed is SGLang's to say: it takes a processor with AMX and a build
of its kernels for CPUs, which no package index has. So its answer is a stand-in's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from standins import Rank

UTILS = "sglang.srt.utils"


@pytest.mark.parametrize(("has_amx", "packing"), [(True, "AMX"), (False, ""), (None, "")])
def test_packing_is_what_sglang_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_amx: bool | None, packing: str
) -> None:
    """``None``: a release that does not have the function."""
    utils = ModuleType(UTILS)
    if has_amx is not None:
        utils.cpu_has_amx_support = lambda: has_amx  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, UTILS, utils)
    rank = Rank(tmp_path / "run")
    rank.runner()
    (device,) = rank.snapshot().devices
    assert (device.name, device.packing) == ("cpu", packing)
