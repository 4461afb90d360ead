# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Our names of metrics against those of SGLang's releases: where something turns colons into
underscores on the way to a store, one of SGLang's must not become one of ours."""

from __future__ import annotations

import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from releases import RELEASES, fetch

from sglang_weight_exporter.export.instruments import INSTRUMENTS

#: SGLang writes its names out, as literals.
NAME = re.compile(rb"[\"'](sglang:[a-z0-9_]+)[\"']")

#: What clients and scrapers append to a family's name.
SUFFIXES = ("", "_total", "_created", "_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def theirs() -> dict[str, str]:
    """Each of SGLang's names, its colon turned into an underscore → a release that has it."""
    found: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for version, sources in zip(RELEASES, pool.map(fetch, RELEASES), strict=True):
            with zipfile.ZipFile(sources) as archive:
                for file in archive.namelist():
                    for name in NAME.findall(archive.read(file)):
                        found[name.decode().replace(":", "_")] = version
    return found


def test_no_name_of_ours_is_one_of_sglangs(theirs: dict[str, str]) -> None:
    assert len(theirs) > 100
    ours = {instrument.name + suffix for instrument in INSTRUMENTS for suffix in SUFFIXES}
    taken = {
        name + suffix: version
        for name, version in theirs.items()
        for suffix in SUFFIXES
        if name + suffix in ours
    }
    assert taken == {}


def test_the_names_that_are_compared_are_there(theirs: dict[str, str]) -> None:
    """The one that was ours once, and a plain one."""
    assert {"sglang_weight_load_duration_seconds", "sglang_token_usage"} <= theirs.keys()
