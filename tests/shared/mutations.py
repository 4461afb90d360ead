# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What is nearly valid: inputs that get past the first check, changed in a few places."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

#: What has broken programs before.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", [], {}, b"", [[]], {"": None}),
    *(0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 0.1, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("x" * 300, "\0", "\n", '"', "\\", "{}", "..", "/", "%s", "\ud800", "\u202e", "💥", "1" * 400),
)

#: Keeps changes small: what is changed everywhere is refused at once.
MOST_CHANGES = 3


def filled(kind: Any) -> Any:
    """Plain values for every field of a record, none of them left away."""
    return _filled(inspect.type_info(kind))


def _filled(kind: inspect.Type) -> Any:
    if isinstance(kind, inspect.StructType):
        return {each.encode_name: _filled(each.type) for each in kind.fields}
    if isinstance(kind, inspect.UnionType):
        return _filled(next(each for each in kind.types if not isinstance(each, inspect.NoneType)))
    if isinstance(kind, inspect.LiteralType):
        return kind.values[0]
    if isinstance(kind, inspect.DictType):
        return {_filled(kind.key_type): _filled(kind.value_type)}
    if isinstance(kind, inspect.VarTupleType | inspect.ListType | inspect.FrozenSetType):
        return [_filled(kind.item_type)]
    if isinstance(kind, inspect.TupleType):
        return [_filled(each) for each in kind.item_types]
    simple: dict[type, Any] = {
        inspect.StrType: "a",
        inspect.IntType: 1,
        inspect.FloatType: 1.5,
        inspect.BoolType: True,
        inspect.BytesType: b"\1" * 8,
    }
    return simple[type(kind)]


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: Any = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    return [path, *(found for key, each in children for found in _paths(each, (*path, key)))]


def _with(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = _with(node[path[0]], path[1:], value)
    return copy


@st.composite
def changed_values(draw: st.DrawFn, valid: Any) -> Any:
    """A document with a few of its values replaced by odd ones, or by others of its own, or a list
    with its entries twice."""
    document = valid
    for _ in range(draw(st.integers(0, MOST_CHANGES))):
        paths = _paths(document)
        path = draw(st.sampled_from(paths))
        borrowed = _at(document, draw(st.sampled_from(paths)))
        here = _at(document, path)
        twice = [here * 2] if isinstance(here, list) else []
        values = st.sampled_from((*ODD_VALUES, borrowed, *twice))
        document = _with(document, path, draw(values))
    return document


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Content with a few of its bytes changed, moved, cut or doubled."""
    content = valid
    for _ in range(draw(st.integers(0, MOST_CHANGES))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 64)))
        between = draw(st.one_of(st.binary(max_size=16), st.just(content[start:end] * 2)))
        content = content[:start] + between + content[end:]
    return content


def as_json(document: Any) -> bytes:
    return json.dumps(document, default=repr).encode()


def packed(document: Any) -> bytes:
    """In msgpack, also what no UTF-8 can hold."""
    return msgspec.msgpack.encode(_without_surrogates(document))


def _without_surrogates(node: Any) -> Any:
    if isinstance(node, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_without_surrogates(each) for each in node]
    if isinstance(node, str):
        return node.encode(errors="replace").decode()
    if isinstance(node, int) and not -(2**63) <= node < 2**64:
        return str(node)
    return node
