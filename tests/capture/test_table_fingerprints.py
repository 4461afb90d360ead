# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A table's fingerprints, by addresses alone as on a GPU and through tensors as on a CPU, are those
of each tensor's bytes in the order in which they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
np = pytest.importorskip("numpy", reason="needs numpy, which comes with SGLang")

from sglang_weight_exporter import fingerprint  # noqa: E402
from sglang_weight_exporter.capture.weights import capture_weights, table_tensors  # noqa: E402
from sglang_weight_exporter.fingerprint.tables import (  # noqa: E402
    TableFingerprints,
    without_rows,
)
from sglang_weight_exporter.fingerprint.tensors import Fingerprinter  # noqa: E402
from sglang_weight_exporter.weight_table import WeightTable, table_fingerprints  # noqa: E402


class ByAddress(Fingerprinter):
    """Reads memory as a kernel would: past torch."""

    def __init__(self) -> None:
        super().__init__()
        self.addressed = 0
        self.tensors = 0

    def has_kernels(self, device: Any) -> bool:
        return True

    def of_addresses(self, device: Any, data_ptr: Any, nbytes: Any, **more: Any) -> Any:
        self.addressed += len(data_ptr)
        return fingerprint.of_arrays(
            [
                np.frombuffer(ctypes.string_at(address, size) if size else b"", dtype=np.uint8)
                for address, size in zip(data_ptr.tolist(), nbytes.tolist(), strict=True)
            ]
        )

    def __call__(self, tensors: Sequence[Any], **more: Any) -> Any:
        self.tensors += len(tensors)
        return super().__call__(tensors, **more)


def model() -> Any:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    made = torch.nn.Module()
    tensors = {
        "plain": noise(300, 50),
        "turned": noise(20, 30).t(),
        "permuted": noise(2, 3, 4).permute(2, 0, 1),
        "gaps": noise(40, 40)[:, ::3],
        "wide": noise(1).expand(5),
        "empty": noise(0, 4),
        "scalar": torch.tensor(2.5),
        "complex": torch.complex(noise(8), noise(8)).conj(),
        "meta": torch.empty(4, device="meta"),
    }
    for name, tensor in tensors.items():
        made.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    made.tied = made.plain
    made.part = made.plain[10:20]
    made.register_buffer("persistent", noise(5))
    made.register_buffer("computed", noise(5), persistent=False)
    return made


def expected(made: Any) -> dict[str, str]:
    named = dict(made.named_parameters(remove_duplicate=False))
    named |= {"persistent": made.persistent, "part": made.part}
    found = {}
    for name, tensor in named.items():
        if tensor.device.type != "meta":
            strides = [-step for step in tensor.stride()]
            order = sorted(range(tensor.dim()), key=strides.__getitem__)
            whole = tensor.detach() if tensor.is_contiguous() else tensor.detach().permute(order)
            found[name] = fingerprint.of_bytes(whole.resolve_conj().contiguous().numpy().tobytes())
    return found


@pytest.fixture(params=[Fingerprinter, ByAddress])
def fingerprinter(request: pytest.FixtureRequest) -> Fingerprinter:
    made: Fingerprinter = request.param()
    return made


def taken(tables: TableFingerprints, made: Any, **more: Any) -> WeightTable:
    captured = capture_weights(made, role="target", captured_at=0.0, **more)
    return tables.take(
        captured.table,
        lambda: table_tensors(captured, made),
        skip=captured.not_persistent,
        limit_seconds=30.0,
    )


def test_every_row_is_its_bytes_and_the_rank_is_of_the_names(fingerprinter: Fingerprinter) -> None:
    tables, made = TableFingerprints(fingerprinter), model()
    for _ in range(3):
        table = taken(tables, made)
        assert table_fingerprints(table) == expected(made)
        assert table.fingerprint == fingerprint.of_rank(expected(made))
        made.plain += 1
        made.turned.data = made.turned.data.clone()  # Elsewhere.
    del made.scalar
    made.another = torch.nn.Parameter(torch.ones(3))
    assert taken(tables, made).fingerprint == fingerprint.of_rank(expected(made))


def test_only_what_has_gaps_or_is_conjugate_is_read_through_its_tensor() -> None:
    reads = ByAddress()
    taken(TableFingerprints(reads), model())
    assert reads.tensors == len({"gaps", "wide", "complex"})
    assert reads.addressed == len(expected(model())) - reads.tensors


def test_a_model_without_tensors(fingerprinter: Fingerprinter) -> None:
    table = taken(TableFingerprints(fingerprinter), torch.nn.ReLU())
    assert (table.fingerprints, table.fingerprint) == (b"", fingerprint.of_bytes(b""))


def test_rows_that_are_no_weights_any_more_leave_the_others_as_they_are() -> None:
    made = model()
    before = taken(TableFingerprints(Fingerprinter()), made)
    del made.part
    after = capture_weights(made, role="target", captured_at=0.0)
    rest = expected(model())
    for name in ("part", "persistent"):
        del rest[name]
    skip = after.not_persistent | {"persistent"}
    table = without_rows(before, after.table, skip)
    assert table_fingerprints(table) == rest
    assert table.fingerprint == fingerprint.of_rank(rest)
