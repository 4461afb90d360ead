# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""A model's tensors become rows, bytes and regions. Expected numbers come from torch itself, or
from counting every byte's address."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")

import random  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

from sglang_weight_exporter.capture.allocations import Segments  # noqa: E402
from sglang_weight_exporter.capture.references import SHARE, Registrations  # noqa: E402
from sglang_weight_exporter.capture.tensors import DerivedPaths, named_tensors  # noqa: E402
from sglang_weight_exporter.capture.weights import (  # noqa: E402
    WeightCapture,
    capture_weights,
    in_pools_of_weights,
)
from sglang_weight_exporter.weight_table import Row, compare_tables, table_regions, table_rows  # noqa: E402

#: As a process has one.
REGISTRATIONS = Registrations()


def capture(model: Any, **options: Any) -> WeightCapture:
    return capture_weights(
        model, role="target", captured_at=1.0, registrations=REGISTRATIONS, **options
    )


def rows(model: Any) -> dict[str, Row]:
    return {row.name: row for row in table_rows(capture(model).table)}


def nbytes(model: Any, **options: Any) -> int:
    return sum(part.nbytes for part in capture(model, **options).usage)


def regions(model: Any) -> list[tuple[int, int]]:
    return [(region.data_ptr, region.nbytes) for region in table_regions(capture(model).table)]


def module(**tensors: Any) -> Any:
    """A module with these parameters (tensors that are no Parameter become buffers)."""
    made = torch.nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            made.register_parameter(name, tensor)
        else:
            made.register_buffer(name, tensor)
    return made


def parameter(*shape: int, dtype: Any = None) -> Any:
    return torch.nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


def test_a_row_is_what_torch_says_of_the_tensor() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    scale = torch.zeros(3)
    model = torch.nn.Sequential(module(weight=weight, scale=scale))
    table = rows(model)
    assert table["0.weight"] == Row(
        name="0.weight",
        data_ptr=weight.data_ptr(),
        nbytes=48,
        dtype="bfloat16",
        shape=(6, 4),
        stride=(4, 1),
        device="cpu",
        kind="parameter",
        storage_ptr=weight.untyped_storage().data_ptr(),
        storage_nbytes=48,
    )
    assert table["0.scale"].kind == "buffer"
    assert table["0.scale"].nbytes == 12


def test_names_and_order_are_torchs_with_buffers_behind_parameters() -> None:
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 16), 2, norm=torch.nn.BatchNorm1d(4)
    )
    expected = [name for name, _ in model.named_parameters()]
    expected += [name for name, _ in model.named_buffers()]
    assert list(rows(model)) == expected


def test_a_tied_tensor_has_both_names_and_counts_once() -> None:
    embedding = parameter(10, 4)
    model = torch.nn.ModuleDict(
        {"embed": module(weight=embedding), "head": module(weight=embedding)}
    )
    table = rows(model)
    assert list(table) == ["embed.weight", "head.weight"]
    assert table["embed.weight"].data_ptr == table["head.weight"].data_ptr
    assert nbytes(model) == 160
    assert regions(model) == [(embedding.data_ptr(), 160)]
    (usage,) = capture(model).usage
    assert usage.tensors == 2


def test_a_module_that_is_used_twice_has_both_names() -> None:
    """As SGLang ties its embeddings: ``lm_head`` is the module ``model.embed_tokens``."""
    shared = module(weight=parameter(2, 2))
    model = torch.nn.ModuleDict({"first": shared, "second": torch.nn.Sequential(shared)})
    named = model.named_parameters(remove_duplicate=False)
    assert list(rows(model)) == [name for name, _ in named] == ["first.weight", "second.0.weight"]
    assert nbytes(model) == 16


def test_modules_that_hold_one_another_are_entered_once_each() -> None:
    """Layers that register their two predecessors: by all their names they are 635,570."""
    layers = [module(weight=parameter(2)) for _ in range(24)]
    held_by_others = 0
    for one, two, layer in zip(layers, layers[1:], layers[2:], strict=False):
        layer.one, layer.two = one, two
        held_by_others += 2
    model = torch.nn.ModuleList(reversed(layers))
    assert named_tensors(model).modules == 1 + len(layers) + held_by_others
    first = capture(model)
    assert first.usage[0].nbytes == 24 * 2 * 4
    names = first.table.names.decode().split("\n")
    assert {name for name, _ in model.named_parameters()} < set(names)
    assert len(names) == len(set(names)) == 24 + held_by_others
    assert capture(model, previous=first) == first


def test_a_module_that_contains_itself_ends() -> None:
    model = module(weight=parameter(2))
    model.child = torch.nn.Module()
    model.child.parent = model
    assert list(rows(model)) == ["weight", "child.parent.weight"]


def test_views_of_one_storage_count_their_storage_once() -> None:
    storage = torch.zeros(100)
    model = module(
        head=torch.nn.Parameter(storage[:30]), tail=torch.nn.Parameter(storage[50:]), all=storage
    )
    table = rows(model)
    assert {row.storage_ptr for row in table.values()} == {storage.data_ptr()}
    assert table["tail"].data_ptr == storage.data_ptr() + 200
    assert nbytes(model) == 400
    usage = {part.kind: part.nbytes for part in capture(model).usage}
    assert usage == {"parameter": 400, "buffer": 0}


def test_two_views_with_a_gap_between_them_are_two_regions() -> None:
    storage = torch.zeros(100)
    model = module(head=storage[:30], tail=storage[50:])
    assert regions(model) == [(storage.data_ptr(), 120), (storage.data_ptr() + 200, 200)]


def test_neighbours_in_one_storage_are_one_region() -> None:
    storage = torch.zeros(100)
    assert regions(module(b=storage[50:], a=storage[:50])) == [(storage.data_ptr(), 400)]


@pytest.mark.parametrize(
    "view",
    [
        lambda storage: storage.view(10, 10)[:, :3],
        lambda storage: storage[::2],
        lambda storage: storage[:1].expand(50),
        lambda storage: torch.as_strided(storage, (3, 3), (10, 2)),
    ],
    ids=["columns", "every second", "expanded", "strided"],
)
def test_the_region_of_a_tensor_with_holes_is_its_whole_storage(view: Any) -> None:
    storage = torch.zeros(100)
    tensor = view(storage)
    assert regions(module(holes=tensor)) == [(storage.data_ptr(), 400)]
    assert rows(module(holes=tensor))["holes"].nbytes == tensor.nbytes
    assert nbytes(module(holes=tensor)) == 400


@pytest.mark.parametrize(
    "view",
    [
        lambda storage: storage.view(5, 20).t(),
        lambda storage: storage.view(2, 5, 10).permute(2, 0, 1),
    ],
    ids=["transposed", "permuted"],
)
def test_a_tensor_whose_dimensions_are_swapped_has_no_holes(view: Any) -> None:
    storage = torch.zeros(200)[:100]
    assert regions(module(turned=view(storage))) == [(storage.data_ptr(), 400)]


def test_a_tensor_of_no_bytes_is_a_row_and_no_region() -> None:
    model = module(empty=parameter(0, 4), full=parameter(1))
    assert rows(model)["empty"].nbytes == 0
    assert len(regions(model)) == 1
    (usage,) = capture(model).usage
    assert (usage.tensors, usage.nbytes) == (2, 4)


def test_a_tensor_on_the_meta_device_has_a_row_and_no_memory() -> None:
    model = module(placeholder=torch.nn.Parameter(torch.empty(1000, device="meta")))
    row = rows(model)["placeholder"]
    assert (row.device, row.data_ptr, row.nbytes, row.storage_nbytes) == ("meta", 0, 0, 0)
    assert regions(model) == []
    assert nbytes(model) == 0


class Packed(torch.Tensor):  # type: ignore[name-defined]
    """A wrapper as torchao and DTensor make them: it owns no memory, the tensors inside do."""

    @staticmethod
    def __new__(cls, data: Any, scale: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data: Any, scale: Any) -> None:
        self.data_part, self.scale_part = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part", "scale_part"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_the_tensors_inside_a_wrapper_stand_for_it() -> None:
    data, scale = torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8)
    nested = Packed(Packed(data, scale), torch.zeros(2))
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(nested, requires_grad=False)
    table = rows(model)
    assert list(table) == [
        "weight.data_part.data_part",
        "weight.data_part.scale_part",
        "weight.scale_part",
    ]
    assert table["weight.data_part.data_part"].data_ptr == data.data_ptr()
    assert table["weight.data_part.data_part"].dtype == "int8"
    assert nbytes(model) == 64 + 32 + 8


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_dtensor_is_its_local_shard() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.zeros(16, 4)
    distributed = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    model = module(weight=torch.nn.Parameter(distributed))
    ((name, row),) = rows(model).items()
    assert name == "weight._local_tensor"
    assert row.data_ptr == distributed.to_local().data_ptr()
    assert row.nbytes == 256


def test_what_another_role_counts_adds_rows_and_no_bytes() -> None:
    shared, own = parameter(100), parameter(10)
    target = capture(module(embed=shared))
    draft = capture(module(embed=shared, layer=own), counted_elsewhere=target.storages)
    assert draft.table.rows == 2
    (usage,) = draft.usage
    assert (usage.tensors, usage.nbytes, usage.shared) == (2, 40, 400)
    assert draft.storages == {own.data_ptr()}


def test_an_unchanged_table_is_recognised_and_a_moved_tensor_is_not() -> None:
    model = module(weight=parameter(100))
    first = capture(model)
    again = capture_weights(model, role="target", captured_at=2.0, previous=first)
    assert again.table.sha256 == first.table.sha256
    assert again.table.captured_at == 2.0
    assert again.regions is first.regions
    model.weight.data = torch.zeros(100)
    moved = capture_weights(model, role="target", captured_at=3.0, previous=first)
    assert moved.table.sha256 != first.table.sha256
    ((row,), (old,)) = (list(table_rows(found.table)) for found in (moved, first))
    assert row.data_ptr == model.weight.data_ptr() != old.data_ptr


def test_a_model_without_tensors_is_an_empty_table() -> None:
    captured = capture(torch.nn.ReLU())
    assert captured.table.rows == 0
    assert list(table_rows(captured.table)) == []
    assert captured.usage == ()
    assert captured.regions == {}


def test_bytes_are_those_of_unique_storages_whatever_the_model() -> None:
    generator = random.Random(1)
    for _ in range(50):
        storages = [torch.zeros(generator.randrange(1, 40)) for _ in range(5)]
        tensors = {}
        for index in range(12):
            storage = generator.choice(storages)
            start = generator.randrange(len(storage))
            tensor = storage[start : generator.randrange(start, len(storage) + 1)]
            name = f"t{index}"
            tensors[name] = torch.nn.Parameter(tensor) if generator.random() < 0.5 else tensor
        model = module(**tensors)
        used = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in named_tensors(model).tensors
        }
        assert nbytes(model) == sum(used.values())


# Derived weights: plain attributes of modules.


def with_derived() -> Any:
    """As SGLang's latent attention keeps them."""
    model = module(weight=torch.nn.Parameter(torch.zeros(8, 4)))
    model.attention = torch.nn.Module()
    model.attention.w_kc = torch.ones(4, 4)
    model.attention.scales = [torch.ones(2), {"k": torch.ones(3)}]
    model.attention.alias = model.weight
    model.attention.half = model.weight[:4]
    model.attention.unset = None
    return model


def derived(captured: WeightCapture) -> dict[str, Row]:
    return {row.name: row for row in table_rows(captured.table) if row.kind == "derived"}


def test_tensors_in_attributes_are_derived_weights_under_the_name_that_leads_to_them() -> None:
    model = with_derived()
    found = derived(capture(model))
    assert set(found) == {
        "attention.w_kc",
        "attention.scales.0",
        "attention.scales.1.k",
        "attention.half",
    }
    assert found["attention.half"].storage_ptr == model.weight.untyped_storage().data_ptr()
    assert nbytes(model) == model.weight.nbytes + 4 * (16 + 2 + 3)  # A view adds no bytes.


def test_what_lies_in_a_pool_without_parameters_is_a_captured_graphs() -> None:
    model = module(weight=torch.nn.Parameter(torch.zeros(8, 4)))
    model.w_kc, model.scale, model.indices = torch.ones(4), torch.ones(2), torch.arange(6)
    pools = {"weight": (0, 1), "w_kc": (0, 1), "scale": (0, 0), "indices": (0, 2)}
    segments = Segments.of_snapshot(
        {
            "address": getattr(model, name).data_ptr(),
            "total_size": getattr(model, name).nbytes,
            "segment_pool_id": pool,
            "blocks": [],
        }
        for name, pool in pools.items()
    )
    found = in_pools_of_weights(model, DerivedPaths.of(model), segments)
    assert found.names() == ["w_kc", "scale"]
    assert in_pools_of_weights(model, found, Segments.none()) is found
    assert set(derived(capture(model, derived=found))) == {"w_kc", "scale"}


def test_no_property_is_run_and_no_other_object_entered() -> None:
    class Pool:
        buffer = torch.zeros(8)

        def __init__(self) -> None:
            self.cache = torch.zeros(8)

    class Attention(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.pool = Pool()

        @property
        def computed(self) -> Any:
            raise AssertionError("run by a capture")

    assert derived(capture(Attention())) == {}


def test_a_derived_weight_that_is_bound_anew_has_moved() -> None:
    model = with_derived()
    first = capture(model)
    before = model.attention.w_kc
    model.attention.w_kc = torch.ones(4, 4)
    after = capture(model, previous=first)
    changes = compare_tables(first.table, after.table)
    assert (changes.moved, changes.names["moved"]) == (1, ("attention.w_kc",))
    assert before is not model.attention.w_kc


def test_nothing_that_was_replaced_is_kept_alive_by_a_capture() -> None:
    model = with_derived()
    first = capture(model)
    gone = [weakref.ref(model.attention.w_kc), weakref.ref(model.weight)]
    model.attention.w_kc = None
    model.attention.alias = model.attention.half = None
    model.weight = torch.nn.Parameter(torch.zeros(8, 4))
    assert [ref() for ref in gone] == [None, None]
    assert first.table.rows


# Captures again.


def changed_shape(model: Any) -> None:
    model.weight.data = model.weight.data.view(4, 8)


def changed_strides(model: Any) -> None:
    model.weight.data = model.weight.data.t()


def changed_dtype(model: Any) -> None:
    model.weight.requires_grad_(False)
    model.weight.data = model.weight.data.view(torch.int32)


def changed_storage(model: Any) -> None:
    model.weight = torch.nn.Parameter(model.weight.data.clone())


def added(model: Any) -> None:
    model.further = torch.nn.Parameter(torch.zeros(2))


def added_module(model: Any) -> None:
    model.child = module(weight=torch.nn.Parameter(torch.zeros(2)))


def removed(model: Any) -> None:
    del model.weight


def renamed_module(model: Any) -> None:
    model.renamed = model.kept
    del model.kept


def another_is_none(model: Any) -> None:
    model.other, model.none = None, torch.nn.Parameter(torch.ones(3))


def another_slot(model: Any) -> None:
    model.w_kc, model.w_vc = None, torch.ones(5)


def moved_derived(model: Any) -> None:
    model.w_kc = torch.ones(5)


def made_sparse(model: Any) -> None:
    model.weight = torch.nn.Parameter(torch.zeros(8, 4).to_sparse())


CHANGES_OF_A_MODEL = [
    changed_shape,
    changed_strides,
    changed_dtype,
    changed_storage,
    added,
    added_module,
    removed,
    renamed_module,
    another_is_none,
    another_slot,
    moved_derived,
    made_sparse,
]


def another_buffer(model: Any) -> None:
    model.scale = torch.ones(2)


def another_child(model: Any) -> None:
    model.kept = module(weight=torch.nn.Parameter(torch.ones(2)))


def without_child(model: Any) -> None:
    model.kept = None


def of_a_derived_weight(model: Any) -> None:
    """Where a derived weight was another's, it is what another one is."""
    model.w_vc = model.w_kc


#: torch does not report it.
UNREPORTED = {removed}


def many_tensors() -> Any:
    """More than are asked for at each capture where they hang."""
    return torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1)) for _ in range(3 * SHARE))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    "change",
    [*CHANGES_OF_A_MODEL, another_buffer, another_child, without_child, of_a_derived_weight],
)
def test_a_second_capture_finds_what_a_first_one_would(change: Any, many: bool) -> None:
    model = module()
    model.many = many_tensors() if many else torch.nn.Identity()
    model.weight = torch.nn.Parameter(torch.zeros(8, 4))
    model.other = torch.nn.Parameter(torch.zeros(3))
    model.register_buffer("scale", torch.zeros(2))
    model.register_parameter("none", None)
    model.kept = module(weight=torch.nn.Parameter(torch.zeros(2)))
    model.w_kc = model.w_vc = torch.zeros(5)
    loaded = capture(model)
    model.w_vc = None
    before = capture(model, previous=loaded)
    kept = model.weight, model.other, model.w_kc, model.scale, model.kept
    assert capture(model, previous=before) == before
    change(model)
    first = capture(model)
    changed = before
    for _ in range(5 if many and change in UNREPORTED else 1):
        changed = capture(model, previous=changed)
    assert (changed.table, changed.usage, changed.storages) == (
        first.table,
        first.usage,
        first.storages,
    )
    assert changed.table.sha256 != before.table.sha256
    assert capture(model, previous=changed) == changed
    del kept


class Walked(dict[str, Any]):
    """Counts how often its modules are asked for."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()


def test_what_watches_torch_goes_with_whoever_wanted_it() -> None:
    from torch.nn.modules import module as of_torch

    hooks = [
        getattr(of_torch, f"_global_{kind}_registration_hooks")
        for kind in ("parameter", "buffer", "module")
    ]
    before = [len(each) for each in hooks]
    registrations = Registrations()
    registrations.watch()
    registrations.watch()
    assert [len(each) for each in hooks] == [number + 1 for number in before]
    module(weight=parameter(1), scale=torch.ones(1)).inner = torch.nn.ReLU()
    assert registrations.count == 3
    del registrations
    assert [len(each) for each in hooks] == before


def test_modules_are_walked_where_something_was_registered_and_not_else() -> None:
    model = module()
    model.kept = module(weight=torch.nn.Parameter(torch.zeros(8, 4)))
    model.__dict__["_modules"] = walked = Walked(model._modules)
    captured = capture(model)
    walked.walks = 0
    for _ in range(3):
        captured = capture(model, previous=captured)
    model.kept.weight.data = torch.zeros(4, 8)
    assert walked.walks == 0
    captured = capture(model, previous=captured)
    assert walked.walks > 0  # What has moved is walked.
    walked.walks = 0
    torch.nn.Linear(1, 1)  # Nobody knows whose it is to be.
    again = capture(model, previous=captured)
    assert (again.table, walked.walks) == (captured.table, 1)
    assert capture(model, previous=again).table == again.table
    assert walked.walks == 1


def test_captures_never_have_the_garbage_collector_run() -> None:
    model = torch.nn.ModuleList(
        module(**{f"w{index}": torch.nn.Parameter(torch.zeros(2)) for index in range(10)})
        for _ in range(500)
    )
    moved = msgspec.structs.replace
    captured = capture(model)
    assert captured.remembered is not None
    elsewhere = [address + 64 for address in captured.remembered.data_ptr]
    remembered = replace(captured.remembered, data_ptr=elsewhere)
    gc.collect()
    runs: list[int] = []

    def count(phase: str, information: dict[str, int]) -> None:
        if phase == "start":
            runs.append(information["generation"])

    gc.callbacks.append(count)
    try:
        for _ in range(20):
            capture(model, previous=captured)
            other = replace(
                captured, remembered=None, table=moved(captured.table, sha256="another")
            )
            capture(model, previous=other)
            capture(model, previous=replace(other, remembered=remembered))
    finally:
        gc.callbacks.remove(count)
    assert runs == []


# Strange tensors.


STRANGE: dict[str, Callable[[], Any]] = {
    "uninitialized": torch.nn.UninitializedParameter,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse in rows": lambda: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda: torch.zeros(8, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_a_tensor_without_storage_costs_its_own_row_and_is_named(
    strange: Callable[[], Any],
) -> None:
    model = module(weight=torch.nn.Parameter(torch.zeros(8, 4)), strange=strange())
    model.register_buffer("behind", torch.zeros(3))
    captured = capture(model)
    assert [row.name for row in table_rows(captured.table)] == ["weight", "behind"]
    assert [sentence.partition(":")[0] for sentence in captured.unreadable] == ["strange"]
    assert sum(usage.nbytes for usage in captured.usage) == 8 * 4 * 4 + 3 * 4
