# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a fingerprint is, and what it cannot miss. NumPy against the definition word by word."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy", reason="needs NumPy, which comes with SGLang")

import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from sglang_weight_exporter import fingerprint  # noqa: E402
from sglang_weight_exporter.fingerprint import definition  # noqa: E402

# The definition word by word, written from docs/fingerprint.md and nothing else.
WORD = (1 << 64) - 1


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def half(data: bytes, seed: int, multiplier: int, fold: int) -> int:
    padded = data + bytes(-len(data) % 8192)
    total = 0
    for chunk, start in enumerate(range(0, len(padded), 65536), 1):
        lanes = [mix(seed + lane * 0x9E3779B97F4A7C15 & WORD) for lane in range(1024)]
        for at in range(start, min(start + 65536, len(padded)), 8):
            lane = at // 8 % 1024
            word = int.from_bytes(padded[at : at + 8], "little")
            state = (lanes[lane] ^ word) * multiplier & WORD
            lanes[lane] = state ^ state >> fold
        total += mix((sum(map(mix, lanes)) & WORD) ^ mix(chunk))
    return mix(total + len(data) + seed & WORD)


def reference(data: bytes) -> str:
    return (
        f"{half(data, 0x243F6A8885A308D3, 0x9E3779B97F4A7C15, 32):016x}"
        f"{half(data, 0x13198A2E03707344, 0xC2B2AE3D27D4EB4F, 29):016x}"
    )


CHUNK, ROW = 65536, 8192


def noise(nbytes: int, seed: int = 1) -> bytearray:
    return bytearray(random.Random(seed).randbytes(nbytes))


#: Worked out by reference(); they stay what they are as long as the definition's version does.
KNOWN = {
    b"": "e9e0033e3badaf36dfc7a99951f24649",
    b"abc": "ff43ba8e55f8fb44107eb912ca89417e",
    bytes(range(256)) * 1024: "44f0b9b5fcdaa8931736686c40a59f0d",
}


@pytest.mark.parametrize("data", KNOWN, ids=len)
def test_known_values_never_change(data: bytes) -> None:
    assert fingerprint.DEFINITION == 2
    assert fingerprint.of_bytes(data) == KNOWN[data]


@pytest.mark.parametrize(
    "nbytes",
    [0, 1, 7, 8, 9, ROW - 1, ROW, ROW + 1, 3 * ROW, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77],
)
def test_numpy_gives_what_the_definition_says(nbytes: int) -> None:
    data = bytes(noise(nbytes))
    assert fingerprint.of_bytes(data) == reference(data)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 70_000), max_size=40), st.integers(0, 15))
def test_many_arrays_at_once_give_what_each_gives(sizes: list[int], offset: int) -> None:
    memory = np.frombuffer(bytes(noise(100_000)), dtype=np.uint8)
    arrays = [memory[offset + at : offset + at + size] for at, size in enumerate(sizes)]
    together = fingerprint.texts(fingerprint.of_arrays(arrays))
    assert together == [fingerprint.of_bytes(array.tobytes()) for array in arrays]


def test_an_array_over_several_blocks() -> None:
    nbytes = 32 * CHUNK * 2 + CHUNK + 5
    data = np.frombuffer(bytes(noise(nbytes)), dtype=np.uint8)
    few = fingerprint.of_arrays([data[:10], data, data[: CHUNK * 3]])
    assert [fingerprint.of_bytes(part) for part in (data[:10], data, data[: CHUNK * 3])] == (
        fingerprint.texts(few)
    )
    assert len(set(fingerprint.texts(few))) == 3


def halves(text: str) -> tuple[str, str]:
    return text[:16], text[16:]


def test_every_flipped_bit_changes_both_halves() -> None:
    data = noise(2 * CHUNK + 1001)
    before = halves(fingerprint.of_bytes(data))
    chance = random.Random(2)
    positions = [0, 7, 8, ROW, CHUNK - 1, CHUNK, 2 * CHUNK, len(data) - 1]
    for position in positions + [chance.randrange(len(data)) for _ in range(60)]:
        data[position] ^= 1 << chance.randrange(8)
        after = halves(fingerprint.of_bytes(data))
        assert after[0] != before[0]
        assert after[1] != before[1]
        before = after


def test_half_of_the_bits_change_for_one_flipped_bit() -> None:
    data = noise(CHUNK + 8)
    chance = random.Random(3)
    before = int(fingerprint.of_bytes(data), 16)
    changed = []
    for _ in range(200):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        after = int(fingerprint.of_bytes(data), 16)
        changed.append(bin(before ^ after).count("1"))
        before = after
    # 128 bits that each change with probability 1/2: 64 in the mean, deviation 5.66. The limits
    # are six deviations of the mean of 200 and of a single one.
    assert abs(sum(changed) / len(changed) - 64) < 6 * 5.66 / 200**0.5
    assert 30 < min(changed) < max(changed) < 98


def test_each_bit_of_the_fingerprint_changes_as_often_as_not() -> None:
    data = noise(1024)
    before = int(fingerprint.of_bytes(data), 16)
    times = [0] * 128
    for position in range(1024):
        data[position] ^= 1
        after = int(fingerprint.of_bytes(data), 16)
        data[position] ^= 1
        for bit in range(128):
            times[bit] += (before ^ after) >> bit & 1
    assert all(abs(count - 512) < 6 * 16 for count in times)


@pytest.mark.parametrize("apart", [8, ROW, 2 * ROW, CHUNK, CHUNK + ROW])
def test_two_swapped_words(apart: int) -> None:
    data = noise(3 * CHUNK)
    before = fingerprint.of_bytes(data)
    for at in range(0, len(data) - apart - 8, len(data) // 23 // 8 * 8):
        data[at : at + 8], data[at + apart : at + apart + 8] = (
            data[at + apart : at + apart + 8],
            data[at : at + 8],
        )
        after = fingerprint.of_bytes(data)
        assert after != before
        before = after


def test_swapped_chunks_rows_and_lanes() -> None:
    data = bytes(noise(2 * CHUNK))
    before = fingerprint.of_bytes(data)
    assert fingerprint.of_bytes(data[CHUNK:] + data[:CHUNK]) != before
    assert fingerprint.of_bytes(data[ROW : 2 * ROW] + data[:ROW] + data[2 * ROW :]) != before
    assert fingerprint.of_bytes(data[:-16] + data[-8:] + data[-16:-8]) != before


def test_shifted_bytes_and_other_lengths() -> None:
    data = bytes(noise(CHUNK + 100))
    zeros = [bytes(nbytes) for nbytes in (0, 1, 7, 8, 9, ROW, ROW + 1, CHUNK, CHUNK + 1, 2 * CHUNK)]
    shifted = [data[shift:] + bytes(shift) for shift in (0, 1, 2, 4, 8, ROW)]
    turned = [data[shift:] + data[:shift] for shift in (1, 2, 4, 8, ROW)]
    seen = [fingerprint.of_bytes(one) for one in zeros + shifted + turned]
    assert len(set(seen)) == len(seen)


def test_flipped_signs_in_one_column_do_not_cancel() -> None:
    """A row of 4,096 bfloat16 is a row of lanes: what a chain xors and multiplies without a fold
    of its own loses three flipped signs (bits 63; 63 and 31 of the words below one another)."""
    data = noise(CHUNK)
    seen = {fingerprint.of_bytes(data)}
    for step in range(7):
        changed = bytearray(data)
        changed[step * ROW + 7] ^= 0x80
        changed[(step + 1) * ROW + 7] ^= 0x80
        changed[(step + 1) * ROW + 3] ^= 0x80
        text = fingerprint.of_bytes(changed)
        assert halves(text)[0] not in [halves(one)[0] for one in seen] or halves(text)[1] not in [
            halves(one)[1] for one in seen
        ]
        seen.add(text)
    assert len(seen) == 8


def test_truncated_fingerprints_collide_as_often_as_chance_has_it() -> None:
    """Data that differ little: sparse, one bit set, two bits set, in each half's 32 low bits."""
    inputs = []
    for first in range(0, 2048, 3):
        data = bytearray(256)
        data[first // 8] |= 1 << first % 8
        inputs.append(bytes(data))
        for second in range(first + 1, 2048, 53):
            both = bytearray(data)
            both[second // 8] |= 1 << second % 8
            inputs.append(bytes(both))
    halves_of = fingerprint.of_arrays([np.frombuffer(one, dtype=np.uint8) for one in inputs])
    count = len(inputs)
    expected = count * (count - 1) / 2 / 2**24
    for half in range(2):
        for shift in (0, 20, 40):
            cut = halves_of[:, half] >> np.uint64(shift) & np.uint64(0xFFFFFF)
            collisions = sum(n * (n - 1) // 2 for n in np.unique(cut, return_counts=True)[1])
            assert abs(collisions - expected) < 6 * expected**0.5 + 1
        assert len(np.unique(halves_of[:, half])) == count


def test_a_rank_is_its_names_and_fingerprints_in_any_order() -> None:
    one, two = fingerprint.of_bytes(b"one"), fingerprint.of_bytes(b"two")
    rank = fingerprint.of_rank({"a.weight": one, "b.weight": two})
    assert rank == fingerprint.of_rank({"b.weight": two, "a.weight": one})
    assert rank == reference(
        b"a.weight\0" + bytes.fromhex(one) + b"b.weight\0" + bytes.fromhex(two)
    )
    others = [{"a.weight": two, "b.weight": one}, {"a.weight": one}, {"a.weight": one, "c": two}]
    assert rank not in [fingerprint.of_rank(other) for other in others]


@given(st.binary(max_size=64))
@settings(max_examples=25, deadline=None)
def test_its_number_is_exact_in_a_float(data: bytes) -> None:
    text = fingerprint.of_bytes(data)
    number = fingerprint.as_number(text)
    assert int(float(number)) == number
    assert f"{int(text, 16):0128b}".startswith(f"{number:053b}")


def test_the_module_imports_no_numpy_before_it_is_used() -> None:
    code = (
        "import sys; from sglang_weight_exporter import fingerprint;"
        "assert fingerprint.as_number('f' * 32) == 2**53 - 1;"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_second_word_undoes_a_flipped_bit_in_both_halves() -> None:
    """After a flip, what the next word of the lane would have to change to bring a half back: the
    two halves never ask for the same."""
    chance = np.random.default_rng(1)
    for bit in range(64):
        asked = []
        for multiplier, fold in zip(definition.MULTIPLIERS, definition.FOLDS, strict=True):
            state = chance.integers(0, 2**64, 1 << 16, dtype=np.uint64)
            ends = []
            for start in (state, state ^ np.uint64(1 << bit)):
                end = start * np.uint64(multiplier)
                ends.append(end ^ end >> np.uint64(fold))
            asked.append(ends[0] ^ ends[1])
        assert not len(np.intersect1d(*asked))
