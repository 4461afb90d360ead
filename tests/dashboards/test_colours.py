# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Series of a panel are told apart also by whoever does not see red or green.

Colours are simulated as Machado, Oliveira and Fernandes give it for full deuteranopia and
protanopia (doi:10.1109/TVCG.2009.113), and compared by CIEDE2000 (doi:10.1002/col.20070).
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
from panel_queries import panels_of

Vector = tuple[float, float, float]
SIGHT: dict[str, tuple[Vector, Vector, Vector]] = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)
#: Told apart without looking twice.
APART = 15


def times(matrix: tuple[Vector, Vector, Vector], vector: Vector) -> Vector:
    x, y, z = (sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix)
    return x, y, z


def lab(colour: str, sight: str) -> Vector:
    """CIELAB of `#rrggbb`, as it is seen."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    seen = times(SIGHT[sight], (linear(red), linear(green), linear(blue)))
    r, g, b = (min(1.0, max(0.0, value)) for value in seen)
    x, y, z = (
        t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116
        for t in (v / w for v, w in zip(times(TO_XYZ, (r, g, b)), WHITE, strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(one: Vector, other: Vector) -> float:
    """CIEDE2000."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = (math.hypot(a1, b1) + math.hypot(a2, b2)) / 2
    more = 1 + 0.5 * (1 - math.sqrt(mean**7 / (mean**7 + 25**7)))
    c1, c2 = math.hypot(a1 * more, b1), math.hypot(a2 * more, b2)
    h1, h2 = (math.degrees(math.atan2(b, a * more)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = (
        1
        - 0.17 * math.cos(math.radians(hue - 30))
        + 0.24 * math.cos(math.radians(2 * hue))
        + 0.32 * math.cos(math.radians(3 * hue + 6))
        - 0.20 * math.cos(math.radians(4 * hue - 63))
    )
    d_l = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / math.sqrt(20 + (light - 50) ** 2))
    d_c = (c2 - c1) / (1 + 0.045 * chroma)
    d_h = 2 * math.sqrt(c1 * c2) * math.sin(math.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    rotation = (
        -2
        * math.sqrt(chroma**7 / (chroma**7 + 25**7))
        * math.sin(math.radians(60 * math.exp(-(((hue - 275) / 25) ** 2))))
    )
    return math.sqrt(d_l**2 + d_c**2 + d_h**2 + rotation * d_c * d_h)


@pytest.mark.parametrize(
    ("one", "other", "published"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
    ],
)
def test_the_measure_is_the_published_one(one: Vector, other: Vector, published: float) -> None:
    """Pairs of Sharma, Wu and Dalal's table."""
    assert difference(one, other) == pytest.approx(published, abs=1e-4)


def colours(panel: dict[str, Any]) -> dict[str, str]:
    """Of its series by name, and of the states that it maps. What has no name of its own has the
    panel's."""
    config = panel.get("fieldConfig", {"overrides": [], "defaults": {}})
    found = {
        override["matcher"]["options"]: each["value"]["fixedColor"]
        for override in config["overrides"]
        for each in override["properties"]
        if each["id"] == "color"
    }
    for mapping in config["defaults"].get("mappings", []):
        for state in mapping["options"].values():
            if "color" in state:
                found[state["text"]] = state["color"]
    return found


def test_series_are_told_apart_and_from_the_lines_of_updates(dashboard: dict[str, Any]) -> None:
    (annotation,) = dashboard["annotations"]["list"]
    assert not annotation["enable"]
    checked = 0
    for panel in panels_of(dashboard):
        named = {k: v for k, v in colours(panel).items() if v.startswith("#")}
        # Least, most, slowest and oldest are one thing, never on one panel.
        shown = {*named.values()}
        if panel["type"] == "timeseries":
            shown.add(annotation["iconColor"])
        for sight in SIGHT:
            for one, other in combinations(shown, 2):
                apart = difference(lab(one, sight), lab(other, sight))
                assert apart >= APART, f"{panel['title']}: {one} and {other}, {sight}: {apart:.1f}"
                checked += 1
    assert checked > 100


def test_no_series_has_a_colour_by_chance(dashboard: dict[str, Any]) -> None:
    """A palette gives colours by number, and is made for eyes that see all of them."""
    for panel in panels_of(dashboard):
        if panel["type"] in {"timeseries", "barchart"}:
            assert panel["fieldConfig"]["defaults"]["color"]["mode"] == "fixed", panel["title"]
            lines = {target["legendFormat"] for target in panel["targets"]}
            if panel["type"] == "timeseries" and len(lines) > 1:
                assert {each for each in lines if "{{" not in each} <= colours(panel).keys()
