# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One call of SGLang's: its arguments, how it ended, and what that did to the weights."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_weight_exporter.hooks.targets import Target
    from sglang_weight_exporter.records.updates import Effect, Source


@dataclass(frozen=True)
class Outcome:
    """How a call of SGLang's ended: with a result or with an exception."""

    result: Any = None
    error: BaseException | None = None

    @property
    def raised(self) -> str:
        """What SGLang's code raised, in its words; empty if it returned."""
        if self.error is None:
            return ""
        try:
            return str(self.error) or repr(self.error)
        except Exception:
            return type(self.error).__name__

    @property
    def described(self) -> str:
        """The exception with its class; empty if it returned."""
        return "" if self.error is None else repr(self.error)


#: What an observer's method returns for a call: it runs to its ``yield`` before SGLang's code
#: and goes on with the outcome after it.
Around = Generator[None, Outcome, None]


class Call:
    """One call of a target, as SGLang made it."""

    __slots__ = ("_args", "_kwargs", "_original", "target")

    def __init__(
        self, target: Target, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> None:
        self.target = target
        self._original = original
        self._args = args
        self._kwargs = kwargs

    @property
    def owner(self) -> Any:
        """``self`` of a method."""
        return self._args[0]

    @property
    def operation(self) -> str:
        """The name of what it does, wherever a release has it."""
        return self.target.name.removeprefix("scheduler.")

    def requested(self, name: str) -> Any:
        """A field of the request that the scheduler serves; ``None`` where it has none."""
        return getattr(self.argument("recv_req"), name, None)

    def argument(self, name: str) -> Any:
        """An argument, however it was passed; ``None`` where the signature lacks it."""
        if name in self._kwargs:
            return self._kwargs[name]
        place = _places(self._original).get(name)
        if place is None:
            return None
        index, default = place
        return self._args[index] if index < len(self._args) else default


@functools.cache
def _places(original: Callable[..., Any]) -> dict[str, tuple[int, Any]]:
    """Argument → its place among those that are passed by position, and its default. Read once:
    binding arguments to a signature costs more than some of SGLang's calls."""
    places = {}
    for index, parameter in enumerate(inspect.signature(original).parameters.values()):
        by_name = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        places[parameter.name] = (sys.maxsize if by_name else index, default)
    return places


def verdict_on(outcome: Outcome) -> tuple[bool, str]:
    """Whether a call of SGLang's succeeded, and its message.

    Runners answer with ``(success, message)``, schedulers and LoRA with an object that has
    ``success``; other answers mean success. Never raises, because a call that has begun must end.
    """
    if outcome.error is not None:
        return False, outcome.raised
    try:
        result = outcome.result
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], bool):
            return result[0], str(result[1])
        success = getattr(result, "success", True)
        message = getattr(result, "message", None) or getattr(result, "error_message", None)
        return bool(success), str(message or "")
    except Exception:
        return True, ""


def effect_of(source: Source | None, outcome: Outcome, succeeded: bool, message: str) -> Effect:
    """What a call did to the weights, by what SGLang's code does before each of its messages.

    ``source``: ``None`` of code that is not SGLang's, whose messages say nothing.
    """
    if succeeded:
        return "changed"
    if source is None:
        return "undefined"
    error = outcome.error
    if error is not None:
        return "unchanged" if _refused(error, message) else "undefined"
    if source == "disk":
        # The rollback reads the new checkpoint again, in every release.
        return "undefined" if message.startswith("Failed to update weights") else "unchanged"
    if source == "ipc":
        refused = "ImportError" in message or message.startswith(_REFUSALS)
        return "unchanged" if refused else "undefined"
    return "undefined" if "partially updated" in message else "unchanged"


#: Beginnings of messages that SGLang gives before it has touched anything: a weight cache shared
#: with other engines, derived weights that cannot follow, an unknown format, no update group.
_REFUSALS = (
    "[weight_cache]",
    "Online weight updates are not supported",
    "Unknown load_format",
    "Group ",
)


def _refused(error: BaseException, message: str) -> bool:
    if isinstance(error, (AssertionError, NotImplementedError, RuntimeError)):
        return message.startswith(_REFUSALS)
    # Until 0.4.8 the group is looked up as an attribute that only its creation sets.
    return isinstance(error, AttributeError) and "_model_update_group" in message
