# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say exists, exists."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sglang_weight_exporter.export.instruments import INSTRUMENTS
from sglang_weight_exporter.settings import PREFIX, Settings

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def test_reference_pages_say_what_the_code_says() -> None:
    generate = [sys.executable, str(PROJECT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(generate, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings
            }
            assert anchor in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_metrics_have_their_real_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    settings = {PREFIX + setting.name.upper() for setting in fields(Settings)}
    for name in re.findall(rf"\b{PREFIX}[A-Z_]*[A-Z]\b", text):
        assert name in settings, f"{page.name} names {name}"
    families = {instrument.name for instrument in INSTRUMENTS}
    metrics = r"\bsglang_(?:weight|kv|lora|gpu)_[a-z_]*(?:bytes|seconds|total|tensors)\b"
    for name in re.findall(metrics, text):
        assert name.removesuffix("_total") in families, f"{page.name} names {name}"
