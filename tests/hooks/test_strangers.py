# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Code of others around and inside SGLang's functions: it runs as without us, and counts once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from standins import Rank, Request, WeightUpdater, model

from sglang_weight_exporter.hooks.targets import UPDATER
from sglang_weight_exporter.store.tables import open_tables

METHOD = "update_weights_from_disk"


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(tmp_path / "runtime")


def as_it_should_be(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        seen.append(arguments[1:])
        return function(*arguments, **keywords)

    return wrapper


def in_a_hurry(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        seen.append(arguments[1:])
        return function(*arguments, **keywords)

    return wrapper


@pytest.mark.parametrize("wrap", [as_it_should_be, in_a_hurry])
@pytest.mark.parametrize("when", ["before us", "after us", "before and after us"])
def test_what_somebody_else_wrapped_as_well_counts_once(
    rank: Rank, wrap: Callable[..., Any], when: str
) -> None:
    seen: list[Any] = []
    stranger = type("WeightUpdater", (WeightUpdater,), {})
    if "before" in when:
        setattr(stranger, METHOD, wrap(getattr(WeightUpdater, METHOD), seen))
    rank.updaters = rank.hook(UPDATER, stranger)
    if "after" in when:
        setattr(rank.updaters, METHOD, wrap(getattr(rank.updaters, METHOD), seen))
    runner = rank.runner()
    assert runner.weight_updater.update_weights_from_disk("other", "auto") == (True, "Success")
    assert seen == [("other", "auto")] * (2 if "and" in when else 1)
    assert rank.totals() == {"disk": (1, 0, 1)}


def test_a_module_that_is_hooked_twice_counts_once(rank: Rank) -> None:
    module = ModuleType(UPDATER)
    module.WeightUpdater = rank.updaters  # type: ignore[attr-defined]
    for _ in range(2):  # Python has reloaded it.
        rank.installation.on_import(module)
    rank.runner().weight_updater.update_weights_from_disk("other", "auto")
    assert rank.totals() == {"disk": (1, 0, 1)}


def test_tensors_that_stop_coming_half_way_raise_what_they_raised(rank: Rank) -> None:
    def half() -> Iterator[tuple[str, torch.Tensor]]:
        yield "proj.weight", torch.ones(4, 4)
        raise ConnectionResetError("the trainer has gone")

    taken: list[str] = []

    def take() -> Any:
        for name, tensor in half():
            runner.model.get_parameter(name).data.copy_(tensor)
            taken.append(name)
        return True, "Success"

    runner = rank.runner(answers={"tensor": take})
    with pytest.raises(ConnectionResetError, match="the trainer has gone"):
        rank.scheduler(runner).update_weights_from_tensor(Request())
    assert taken == ["proj.weight"]
    assert rank.totals() == {"tensor": (0, 1, 1)}
    update = rank.last_update()
    assert (update.succeeded, update.effect) == (False, "undefined")
    assert "the trainer has gone" in update.message


def test_a_model_that_was_replaced_during_an_update_is_the_one_that_is_shown(rank: Rank) -> None:
    def replace() -> Any:
        runner.model = model(rows=16)
        return True, "Success"

    runner = rank.runner(answers={"disk": replace})
    before = sum(part.nbytes for part in rank.weights())
    runner.weight_updater.update_weights_from_disk("other", "auto")
    expected = sum(parameter.nbytes for parameter in runner.model.parameters())
    assert sum(part.nbytes for part in rank.weights()) == expected != before
    (reader,) = open_tables(rank.directory)
    pointers = {row.name: row.data_ptr for row in reader.read().rows()}
    assert pointers == {name: each.data_ptr() for name, each in runner.model.named_parameters()}


class Raising(torch.Tensor):
    """Of a library whose tensors can be computed with and not be asked where they are."""

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any, **more: Any) -> Any:
        raise NotImplementedError("no such thing on this backend")


def test_a_tensor_that_raises_costs_its_own_row(rank: Rank) -> None:
    runner = rank.runner()
    runner.model.register_buffer("strange", torch.zeros(4).as_subclass(Raising))
    assert runner.weight_updater.update_weights_from_disk("other", "auto") == (True, "Success")
    assert rank.totals() == {"disk": (1, 0, 1)}
    (reader,) = open_tables(rank.directory)
    names = {row.name for row in reader.read().rows()}
    assert {"embed_tokens.weight", "proj.weight"} <= names
