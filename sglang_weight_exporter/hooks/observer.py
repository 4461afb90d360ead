# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each of SGLang's calls means: one method a meaning in the table of targets.

A method is a generator that runs to its ``yield`` before SGLang's code and goes on with the outcome
after it. It keeps nothing, opens no file and reads no tensor: it tells the rank. Exceptions are
caught by the caller.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from sglang_weight_exporter.capture.weights import storages_of
from sglang_weight_exporter.hooks.calls import Around, Call, Outcome, effect_of, verdict_on
from sglang_weight_exporter.ledger import EndsWith, Ticket, Verdict
from sglang_weight_exporter.rank import KV_CACHE, WEIGHTS, Rank
from sglang_weight_exporter.records import PAUSES, Source
from sglang_weight_exporter.runners import identity
from sglang_weight_exporter.runners.roles import RunnerRole


class Observer:
    """Translates calls of SGLang."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    # The life of a rank and of its model runners.

    def start(self, call: Call) -> Around:
        """``Scheduler.__init__``: a draft gives up its own embeddings for the target's after its
        pools are allocated, so the tables are true only when this has ended."""
        self._rank.roles.tell_dp_rank(call.argument("dp_rank"))
        self._rank.step(lambda ledger: ledger.begin_start(), quietly=True)
        yield
        self._rank.roles.identify(call.owner)
        self._rank.scan.watch(call.owner)
        self._rank.look(*self._rank.roles, derived=True, pools=True)
        self._rank.step(lambda ledger: ledger.end_start())

    def construct(self, call: Call) -> Around:
        """``ModelRunner.__init__``: loads the model somewhere inside, and changes it after that."""
        outcome = yield
        if (role := self._rank.roles.find(call.owner)) is not None and outcome.error is None:
            # Until 0.5.13 the pools are allocated inside.
            self._tell_load(role, complete=not hasattr(call.owner, "alloc_memory_pool"))

    def load(self, call: Call) -> Around:
        """``ModelRunner.load_model``."""
        role = self._rank.role(call.owner)
        if role is not None:
            started_at = self._rank.step(lambda ledger: ledger.begin_load())
            outcome = yield
            self._loaded(role, call.owner, outcome, started_at)

    def _loaded(
        self, role: RunnerRole, owner: Any, outcome: Outcome, started_at: float | None
    ) -> None:
        if outcome.error is None:
            self._rank.look(role, derived=True, pools=True)
        self._rank.step(
            lambda ledger: ledger.end_load(
                role.name,
                started_at,
                error=_error(outcome),
                placeholders=getattr(owner, "startup_weight_load", None) is not None,
                model_path=role.model_path,
                weight_version=str(identity.server_setting(owner, "weight_version") or ""),
            )
        )

    def finalize_load(self, call: Call) -> Around:
        """``finalize_startup_weight_load``: with overlapped loading, ``load_model`` returned with
        placeholders and the values have come only now."""
        outcome = yield
        if (role := self._rank.roles.find(call.owner)) is not None:
            self._rank.look(role, derived=True, pools=True)
            self._rank.step(lambda ledger: ledger.finalize_load(role.name, error=_error(outcome)))

    def allocate_kv_pool(self, call: Call) -> Around:
        """Allocation of the KV pool, and its resize once CUDA graphs are captured."""
        outcome = yield
        role = self._rank.role(call.owner)
        if role is not None and outcome.error is None:
            self._tell_load(role, complete=True)

    def _tell_load(self, role: RunnerRole, *, complete: bool) -> None:
        self._rank.look(role, derived=True, pools=True)
        complete = complete or self._rank.scan.of(role).kv_pools is not None
        self._rank.step(lambda ledger: ledger.tell_load(role.name) if complete else None)

    # Models without a model runner.

    def begin_load(self, call: Call) -> Around:
        """``get_model_loader``, the first step of every load."""
        self._rank.step(lambda ledger: ledger.begin_load(), quietly=True)
        yield

    def start_encoder(self, call: Call) -> Around:
        """``run_dp_worker`` of an encoder server; the encoder is told its rank when it is made."""
        self._rank.roles.tell_dp_rank(call.argument("dp_rank"))
        yield

    def load_without_runner(self, call: Call) -> Around:
        """``MMEncoder.__init__``, which loads the model, and ``WeightCacheDaemon._export_state``,
        the last step of its ``load``."""
        outcome = yield
        role = self._rank.role(call.owner)
        if role is not None:
            self._loaded(role, call.owner, outcome, self._rank.ledger.load_began_at)
            self._rank.step(lambda ledger: ledger.tell_load(role.name))

    def map_weights(self, call: Call) -> Around:
        """``IpcModelLoader`` maps a weight-cache daemon's tensors: they count there."""
        outcome = yield
        if isinstance(outcome.result, torch.nn.Module):
            self._rank.scan.map(storages_of(outcome.result))

    # Updates, at the level where tensors change.

    def update(self, call: Call) -> Around:
        """One call that writes weights: a whole update, or one bucket of it."""
        role = self._rank.role(call.owner)
        source = call.target.source
        if role is not None and source is not None:
            whole = source in {"disk", "ipc"}
            yield from self._write(role, source, "request" if whole else "later")

    def external(self, call: Call) -> Around:
        """Code beside SGLang changes weights by its own means and says so."""
        role = self._rank.role(call.owner)
        if role is not None and call.target.source is not None:
            yield from self._write(role, call.target.source, "call", announced=True)

    def check(self, call: Call) -> Around:
        """``check_weights``; its action ``reset_tensors`` overwrites the weights."""
        role = self._rank.role(call.owner)
        if role is not None and call.argument("action") == "reset_tensors":
            outcome = yield from self._write(role, "external", "call", announced=True)
        else:
            outcome = yield
            self._rank.read_again()
        self._count(call, outcome)

    def move_experts(self, call: Call) -> Around:
        """Some layers' experts move, from peers or again from disk."""
        role = self._rank.roles.named("target")
        if role is None:
            return
        ticket = self._rank.step(lambda ledger: ledger.begin_move(role.name))
        if ticket is not None:  # Not inside another one.
            self._rank.keep_readers_out()
            verdict = _verdict("eplb", (yield), announced=True)
            self._rank.step(lambda ledger: ledger.finish_move(ticket, verdict))

    def _write(
        self, role: RunnerRole, source: Source, ends_with: EndsWith, *, announced: bool = False
    ) -> Generator[None, Outcome, Outcome]:
        """Around one call that writes weights. ``announced``: not SGLang's, whose failures are
        known by what they say."""
        self._rank.look_before(role)
        ticket: Ticket | None = self._rank.step(
            lambda ledger: ledger.begin(role.name, source, ends_with=ends_with)
        )
        self._rank.keep_readers_out()
        outcome = yield
        if ticket is not None:
            verdict = _verdict(source, outcome, announced=announced)
            self._rank.step(lambda ledger: ledger.finish(ticket, verdict))
        return outcome

    def receive(self, call: Call) -> Around:
        """Tensors arrive, to be loaded by further calls; seen for its failures."""
        role = self._rank.role(call.owner)
        source = call.target.source
        outcome = yield
        if role is not None and source is not None and outcome.error is not None:
            message = verdict_on(outcome)[1]
            self._rank.step(lambda ledger: ledger.fail_receiving(role.name, source, message))

    def begin_session(self, call: Call) -> Around:
        """An update with a beginning and an end, and any number of calls between."""
        role = self._rank.role(call.owner)
        if role is not None:
            self._rank.look_before(role)
            self._rank.step(lambda ledger: ledger.begin_session(role.name))
            self._rank.keep_readers_out()
            outcome = yield
            if outcome.error is not None:
                self._rank.step(lambda ledger: ledger.abandon_session(role.name))

    def end_session(self, call: Call) -> Around:
        """The session is over, and weights that were unpacked for it are packed again."""
        role = self._rank.role(call.owner)
        outcome = yield
        if role is not None:
            error = "" if outcome.error is None else verdict_on(outcome)[1]
            run_post_load = bool(call.argument("run_post_load"))
            self._rank.step(
                lambda ledger: ledger.end_session(
                    role.name, error=error, run_post_load=run_post_load
                )
            )

    def request(self, call: Call) -> Around:
        """A request of the scheduler: where updates of several calls or runners end."""
        request = call.argument("recv_req")
        flush_cache = bool(getattr(request, "flush_cache", False))
        version = str(getattr(request, "weight_version", None) or "")
        self._rank.step(
            lambda ledger: ledger.begin_request(flush_cache=flush_cache, weight_version=version),
            quietly=True,
        )
        outcome = yield
        succeeded, message = verdict_on(outcome)
        raised = outcome.error is not None
        self._rank.step(
            lambda ledger: ledger.end_request(succeeded=succeeded, message=message, raised=raised),
            quietly=not self._rank.ledger.updating,
        )

    def change_version(self, call: Call) -> Around:
        """SGLang took note of a new weight version."""
        outcome = yield
        version = call.argument("new_version")
        if version is not None and outcome.error is None:
            self._rank.step(lambda ledger: ledger.change_version(str(version)))

    def rebalance(self, call: Call) -> Around:
        """A rebalance moves experts layer by layer; all of it is one update."""
        self._rank.step(lambda ledger: ledger.begin_rebalance(), quietly=True)
        yield
        self._rank.step(lambda ledger: ledger.end_rebalance(), quietly=True)

    # The cache that weights leave behind.

    def flush(self, call: Call) -> Around:
        """``Scheduler.flush_cache``, which refuses while requests run or wait."""
        outcome = yield
        succeeded = outcome.error is None and bool(outcome.result)
        self._rank.step(lambda ledger: ledger.flush(succeeded=succeeded))

    def pause(self, call: Call) -> Around:
        """Generation is interrupted; mode ``abort`` does not get here, see :meth:`abort`."""
        mode = getattr(call.argument("recv_req"), "mode", None)
        outcome = yield
        if mode in PAUSES and outcome.error is None:
            self._rank.step(lambda ledger: ledger.pause(mode))

    def proceed(self, call: Call) -> Around:
        """Generation goes on; also where it was not paused."""
        outcome = yield
        if outcome.error is None:
            self._rank.step(lambda ledger: ledger.proceed())

    def abort(self, call: Call) -> Around:
        """Requests are aborted: one that a client gave up, which is nothing to us, or all."""
        if getattr(call.argument("recv_req"), "abort_all", False):
            yield
            self._rank.step(lambda ledger: ledger.pause("abort"))

    # Memory that is given back and taken again.

    def release(self, call: Call) -> Around:
        """Physical memory goes, addresses stay. Where it failed, nobody knows which."""
        self._rank.scan.memory_is_there = False
        outcome = yield
        if outcome.error is None:
            self._rank.release(self._saved_tags(call))

    def resume(self, call: Call) -> Around:
        """Physical memory is back."""
        outcome = yield
        if outcome.error is None:
            self._rank.resume(self._saved_tags(call))

    def _saved_tags(self, call: Call) -> set[str]:
        role = self._rank.roles.named("target")
        if role is None or not role.saves_memory:
            return set()  # Answered, and nothing done.
        tags = getattr(call.argument("recv_req"), "tags", None)
        return {WEIGHTS, KV_CACHE} & set(tags or (WEIGHTS, KV_CACHE))

    # What surrounds an update.

    def group(self, call: Call) -> Around:
        """A process group for distributed updates is made or destroyed."""
        outcome = yield
        if verdict_on(outcome)[0]:
            is_open = call.target.name == "init_weights_update_group"
            name = str(call.argument("group_name"))
            self._rank.step(lambda ledger: ledger.set_group(name, is_open=is_open), quietly=True)
        self._count(call, outcome)

    def operate(self, call: Call) -> Around:
        """Weights are read, saved or sent."""
        self._count(call, (yield))

    def read(self, call: Call) -> Around:
        """``get_weights_by_name``, which logs an error and answers with nothing."""
        outcome = yield
        self._count(call, outcome, failed=outcome.result is None)

    def lora(self, call: Call) -> Around:
        """An adapter is loaded or unloaded."""
        outcome = yield
        if (role := self._rank.role(call.owner)) is not None:
            self._rank.look(role, pools=True)
        self._count(call, outcome)

    def _count(self, call: Call, outcome: Outcome, *, failed: bool = False) -> None:
        failed = failed or not verdict_on(outcome)[0]
        operation = call.target.name
        self._rank.step(lambda ledger: ledger.count_operation(operation, failed=failed))


def _error(outcome: Outcome) -> str:
    return "" if outcome.error is None else repr(outcome.error)


def _verdict(source: Source, outcome: Outcome, *, announced: bool) -> Verdict:
    succeeded, message = verdict_on(outcome)
    if announced:
        return Verdict(succeeded, "changed" if succeeded else "undefined", message)
    return Verdict(succeeded, effect_of(source, outcome, succeeded, message), message)
