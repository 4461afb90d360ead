# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Sums that add up: of parts, of shares, of what several processes of a trainer hold."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from sglang_weight_exporter.fingerprint import sums, tensor_sums
from sglang_weight_exporter.records.shares import Share
from sglang_weight_exporter.trainer import Sharded, sum_tensors, write_manifest
from sglang_weight_exporter.verification.manifest import ManifestError, read_parts
from sglang_weight_exporter.verification.sent import SentTensor, UnknownShareError

MASK = (1 << 64) - 1


def as_documented(tensor: torch.Tensor) -> str:
    """Word by word, as docs/fingerprint.md has it."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    first = second = 0
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    for number, row in enumerate(rows):
        content = row.contiguous().view(torch.uint8).numpy().tobytes()
        for column in range(-(-len(content) // 8)):
            word = int.from_bytes(content[8 * column : 8 * column + 8], "little")
            key = (number * 0x9E3779B97F4A7C15 + column * 0xC2B2AE3D27D4EB4F) & MASK
            a = mix(word ^ (key + 0x243F6A8885A308D3 & MASK)) if word else 0
            b = (a ^ a >> 32) * 0x165667B19E3779F9 & MASK
            first, second = first + a, second + (b ^ b >> 29)
    return f"{first & MASK:016x}{second & MASK:016x}"


def share(tensor: torch.Tensor, row: int = 0, column: int = 0) -> Share:
    rows, columns = tensor_sums.words_of(tensor).shape
    return Share(0, "", 0, rows, columns, row, column)


def sum_of(tensor: torch.Tensor, row: int = 0, column: int = 0) -> str:
    runs = [tensor_sums.Run(tensor_sums.words_of(tensor), row, column)]
    return tensor_sums.texts(tensor_sums.of_runs(runs))[0]


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("shape", [(), (3,), (8,), (5, 7), (4, 16), (2, 3, 8), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_the_definition(shape: tuple[int, ...], dtype: torch.dtype, noise: torch.Generator) -> None:
    tensor = (torch.rand(shape, generator=noise) * 200).to(dtype)
    expected = as_documented(tensor)
    assert sum_of(tensor) == expected
    whole = sum_tensors({"t": tensor})["t"]
    assert whole.is_whole
    assert whole.of(share(tensor)) == expected
    assert sums.added(whole.column_sums) == sums.added(whole.row_sums) == expected


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_a_share_of_any_cut(cut: int, noise: torch.Generator) -> None:
    tensor = torch.randn((48, 64), generator=noise, dtype=torch.bfloat16)
    sent = sum_tensors({"t": tensor})["t"]
    for number, rows in enumerate(tensor.chunk(cut)):
        assert sent.of(share(rows, number * 48 // cut)) == sum_of(rows, number * 48 // cut)
    for number, columns in enumerate(tensor.chunk(cut, 1)):
        at = number * 64 // cut * 2 // 8
        assert sent.of(share(columns, 0, at)) == sum_of(columns, 0, at)


def test_a_vocabulary_that_was_filled_up() -> None:
    tensor = torch.randn((1000, 8))
    sent = sum_tensors({"t": tensor})["t"]
    for rank in range(4):  # 1,024 rows in all.
        own = tensor[256 * rank : 256 * (rank + 1)]
        filled = torch.zeros((256, 8))
        filled[: len(own)] = own
        assert sent.of(share(filled, 256 * rank)) == sum_of(filled, 256 * rank)


def test_what_was_not_cut_so_is_not_known() -> None:
    tensor = torch.randn((48, 64))
    with pytest.raises(
        UnknownShareError, match=r"rows 0 to 20 of 48.* write it with 12 among its cuts"
    ):
        sum_tensors({"t": tensor})["t"].of(share(tensor[:20]))
    with pytest.raises(UnknownShareError, match="24 rows of 16 words"):
        sum_tensors({"t": tensor})["t"].of(share(tensor[:24, :32]))


def test_each_flipped_bit_and_swap_is_another_sum() -> None:
    tensor = torch.randn((16, 16), dtype=torch.bfloat16)
    found = {sum_of(tensor)}
    for bit in range(16):
        other = tensor.clone()
        other.view(torch.int16)[3, 5] ^= -(1 << 15) if bit == 15 else 1 << bit
        found.add(sum_of(other))
    found |= {sum_of(tensor.flip(0)), sum_of(tensor.t().contiguous()), sum_of(tensor.roll(4, 1))}
    assert len(found) == 20


def pieces(tensor: torch.Tensor, chance: random.Random) -> Iterator[Sharded]:
    """A tensor cut at random in one dimension after the other, between words."""
    blocks = [Sharded(tensor, tuple(tensor.shape), (0,) * tensor.dim())]
    for dim in range(tensor.dim()):
        cut: list[Sharded] = []
        for block in blocks:
            step = 8 // tensor.element_size() if dim == tensor.dim() - 1 else 1
            at = chance.randrange(0, block.local.shape[dim] + 1, step)
            offset = list(block.offset)
            offset[dim] += at
            first = block.local.narrow(dim, 0, at)
            second = block.local.narrow(dim, at, block.local.shape[dim] - at)
            cut += [block._replace(local=first), Sharded(second, block.shape, tuple(offset))]
        blocks = cut
    return iter(blocks)


@pytest.mark.parametrize("shape", [(48,), (24, 16), (4, 6, 8)])
def test_parts_of_a_trainers_ranks_are_the_whole(shape: tuple[int, ...], tmp_path: Path) -> None:
    chance = random.Random(7)
    tensor = torch.randn(shape, dtype=torch.float32)
    path = tmp_path / "manifest_7.json"
    parts = list(pieces(tensor, chance))
    for number, piece in enumerate(parts):
        assert read_parts(path) is None
        held = {"t": piece, "norm": torch.ones(4)}  # Every rank has that one.
        write_manifest(path, held, cuts=(1, 2, 4), weight_version="7", part=(number, len(parts)))
    found = read_parts(path)
    assert found is not None
    assert found.weight_version == "7"
    expected = {"norm": torch.ones(4), "t": tensor}
    assert found.sent == sum_tensors(expected, cuts=(1, 2, 4))


def test_a_part_that_is_missing_or_twice_there_is_said(tmp_path: Path) -> None:
    path = tmp_path / "manifest_1.json"
    half = Sharded(torch.ones(2, 8), (4, 8), (0, 0))
    for number in range(2):
        write_manifest(path, {"t": half}, cuts=(1,), part=(number, 2))
    with pytest.raises(ManifestError, match="written twice"):
        read_parts(path)
    write_manifest(path, {"t": half}, cuts=(1,), part=(1, 3))
    with pytest.raises(ManifestError, match="several manifests"):
        read_parts(path)


def test_replicas_of_a_trainer_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "manifest_1.json"
    for number in range(2):
        write_manifest(path, {"t": torch.full((4,), number)}, cuts=(1,), part=(number, 2))
    with pytest.raises(ManifestError, match="several processes that hold different ones"):
        read_parts(path)


def test_a_sent_tensor_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensor = torch.randn((48, 64))
    written = write_manifest(tmp_path / "m.json", {"t": tensor}, cuts=(1, 2))
    read = read_parts(tmp_path / "m.json")
    assert read == written
    assert read is not None
    assert isinstance(read.sent, dict)
    assert isinstance(read.sent["t"], SentTensor)
