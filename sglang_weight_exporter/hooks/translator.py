# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What each of SGLang's calls means: one method a meaning in the table of targets.

A method is a generator that runs to its ``yield`` before SGLang's code and goes on with the outcome
after it; or it returns ``None`` where a call means nothing. It keeps nothing, opens no file and
reads no tensor: it notifies the rank. Exceptions are caught by the caller.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator

from sglang_weight_exporter.capture import update_bytes
from sglang_weight_exporter.hooks.holds import Holds
from sglang_weight_exporter.hooks.unlogged import unlogged
from sglang_weight_exporter.hooks.wrapped_call import Around, Call, Outcome, effect_of, verdict_on
from sglang_weight_exporter.ledger import CallToken, EndsWith, Ledger, Verdict
from sglang_weight_exporter.rank import UPDATE_FINGERPRINT_SECONDS, Rank
from sglang_weight_exporter.records.fingerprints import PART, PARTS
from sglang_weight_exporter.records.pools import PAUSES
from sglang_weight_exporter.records.updates import Source
from sglang_weight_exporter.runners.roles import RunnerRole


class Translator:
    """Translates calls of SGLang into steps of a rank.

    An update is loading unless a call inside it says otherwise: releases that have receiving or
    post-processing inside of one function with the loading are not told apart.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._holds = Holds(rank)

    # The life of a rank and of its model runners.

    def start(self, call: Call) -> Around:
        """``Scheduler.__init__``: a draft gives up its own embeddings for the target's after its
        pools are allocated, so the tables are true only when this has ended."""
        self._rank.roles.set_dp_rank(call.argument("dp_rank"))
        self._rank.step(Ledger.begin_start, then="")
        yield
        self._rank.roles.identify(call.owner)
        self._rank.inspector.watch(call.owner)
        self._rank.capture(*self._rank.roles, complete=True, pools=True)
        self._rank.step(lambda ledger: ledger.loads.end_start())

    def construct(self, call: Call) -> Around:
        """``ModelRunner.__init__``: loads the model somewhere inside, and changes it after that."""
        outcome = yield
        # Until 0.5.13 the pools are allocated inside.
        complete = not hasattr(call.owner, "alloc_memory_pool")
        self._report_load(self._rank.roles.find(call.owner), outcome, complete=complete)

    def load(self, call: Call) -> Around:
        """``ModelRunner.load_model``."""
        role = self._rank.role(call.owner)
        if role is not None:
            started_at = self._rank.step(lambda ledger: ledger.loads.begin())
            self._end_load(role, (yield), started_at)

    def _end_load(self, role: RunnerRole, outcome: Outcome, started_at: float | None) -> None:
        if outcome.error is None:
            complete = not self._rank.ledger.loads.starting
            self._rank.capture(role, loaded=True, complete=complete, pools=True)
        self._rank.step(
            lambda ledger: ledger.loads.end(
                role.name,
                started_at,
                error=outcome.described,
                placeholders=role.has_placeholders,
                model_path=role.model_path,
                weight_version=role.weight_version,
            )
        )

    def finalize_load(self, call: Call) -> Around:
        """``finalize_startup_weight_load``: with overlapped loading, ``load_model`` returned with
        placeholders and the values have come only now."""
        outcome = yield
        if (role := self._rank.roles.find(call.owner)) is not None:
            complete = not self._rank.ledger.loads.starting
            self._rank.capture(role, loaded=True, complete=complete, pools=True)
            self._rank.step(
                lambda ledger: ledger.loads.finalize(role.name, error=outcome.described)
            )

    def allocate_kv_pool(self, call: Call) -> Around:
        """Allocation of the KV pool, and its resize once CUDA graphs are captured."""
        self._rank.roles.set_free_memory(call.argument("total_gpu_memory"))  # Until 0.5.9.
        outcome = yield
        self._report_load(self._rank.role(call.owner), outcome, complete=True)

    def _report_load(self, role: RunnerRole | None, outcome: Outcome, *, complete: bool) -> None:
        if role is not None and outcome.error is None:
            self._rank.capture(role, pools=True)
            complete = complete or self._rank.inspector.of(role).kv_pools is not None
            self._rank.step(lambda ledger: ledger.loads.report(role.name) if complete else None)

    # Models without a model runner.

    def begin_load(self, call: Call) -> Around:
        """``get_model_loader``, the first step of every load."""
        self._rank.step(lambda ledger: ledger.loads.begin(), then="")
        yield

    def start_encoder(self, call: Call) -> Around:
        """``run_dp_worker`` of an encoder server; the encoder gets its rank when it is made."""
        self._rank.roles.set_dp_rank(call.argument("dp_rank"))
        yield

    def load_without_runner(self, call: Call) -> Around:
        """``MMEncoder.__init__``, which loads the model, and ``WeightCacheDaemon._export_state``,
        the last step of its ``load``."""
        outcome = yield
        role = self._rank.role(call.owner)
        if role is not None:
            self._end_load(role, outcome, self._rank.ledger.loads.began_at)
            self._rank.step(lambda ledger: ledger.loads.report(role.name))

    def map_weights(self, call: Call) -> Around:
        """``IpcModelLoader`` maps a weight-cache daemon's tensors: they count there."""
        outcome = yield
        self._rank.inspector.map(outcome.result)

    # Updates, at the level where tensors change.

    def update(self, call: Call) -> Around:
        """One call that writes weights: a whole update, or one bucket of it."""
        whole = call.target.source in {"disk", "ipc"}
        yield from self._write(call, call.target.source, "request" if whole else "later")

    def external(self, call: Call) -> Around:
        """Code beside SGLang changes weights by its own means and says so."""
        yield from self._write(call, call.target.source, "call", announced=True)
        self._holds.end()

    def move_experts(self, call: Call) -> Around:
        """Some layers' experts move, from peers or again from disk."""
        role = self._rank.roles.named("target")
        if role is not None:
            yield from self._account(
                "eplb", lambda ledger: ledger.updates.begin_move(role.name), announced=True
            )

    def _write(
        self, call: Call, source: Source | None, ends_with: EndsWith, *, announced: bool = False
    ) -> Generator[None, Outcome, Outcome]:
        role = self._rank.role(call.owner)
        if role is None or source is None:
            return (yield)
        since = self._rank.capture_before_update("external" if announced else source)
        self._holds.begin(since=since)
        nbytes = update_bytes.of_call(call.argument)
        return (
            yield from self._account(
                source,
                lambda ledger: ledger.updates.begin(
                    role.name, source, ends_with=ends_with, since=since
                ),
                announced=announced,
                nbytes=nbytes,
            )
        )

    def _account(
        self,
        source: Source,
        begin: Callable[[Ledger], CallToken | None],
        *,
        announced: bool,
        nbytes: int | None = None,
    ) -> Generator[None, Outcome, Outcome]:
        """Around any call that writes weights; ``announced`` ones fail by what they say alone."""
        if announced or source != "distributed":  # It may write from anywhere.
            self._rank.arrivals.finish_reading()
        token = self._rank.step(begin, then="note")
        self._rank.lock_tables()
        if token is not None and nbytes is not None:
            self._rank.ledger.updates.add_bytes(nbytes)
        with self._rank.arrivals.receiving(source):
            outcome = yield
        if token is not None:
            succeeded, message = verdict_on(outcome)
            effect = effect_of(None if announced else source, outcome, succeeded, message)
            verdict = Verdict(succeeded, effect, message)
            # Where a request ends it, that is next.
            goes_on = token.ends_with == "later" or self._rank.ledger.updates.in_session
            self._rank.step(
                lambda ledger: ledger.updates.finish(token, verdict),
                then="note" if goes_on else "",
            )
        return outcome

    # Calls inside an update: where its time goes, and its bytes.

    def receive(self, call: Call) -> Around:
        """Tensors arrive, to be loaded by further calls."""
        role, source = self._rank.role(call.owner), call.target.source
        if role is None or source is None:
            return
        self._rank.step(
            lambda ledger: ledger.updates.begin_receiving(role.name, source), then="note"
        )
        with self._rank.arrivals.receiving(source):
            outcome = yield
        message = outcome.raised
        if outcome.error is None:
            self._rank.step(lambda ledger: ledger.updates.set_phase("wait", role.name), then="")
        else:
            self._rank.step(
                lambda ledger: ledger.updates.fail_receiving(role.name, source, message),
                then="note",
            )

    def read_files(self, call: Call) -> Around:
        """``_prepare_weights``, which says what files a checkpoint's tensors are read from."""
        outcome = yield
        if outcome.error is None and self._rank.ledger.updates.reading_all:
            _, files, _ = outcome.result
            nbytes = update_bytes.of_files(files)
            self._rank.step(lambda ledger: ledger.updates.add_bytes(nbytes), then="")

    def post_process(self, call: Call) -> Around:
        """Weights are unpacked before a load or packed after it, inside the call that loads; in a
        session its beginning and its end do the same."""
        if self._rank.ledger.updates.writing:
            self._rank.step(lambda ledger: ledger.updates.set_phase("post_process"), then="note")
            yield
            self._rank.step(lambda ledger: ledger.updates.set_phase("load"), then="")

    # Sessions, requests and rebalances.

    def begin_session(self, call: Call) -> Around:
        """An update with a beginning and an end, and any number of calls between."""
        role = self._rank.role(call.owner)
        if role is not None:
            since = self._rank.capture_before_update(None)
            self._holds.begin(since=since)
            self._rank.step(
                lambda ledger: ledger.updates.begin_session(role.name, since=since), then="note"
            )
            self._rank.lock_tables()
            outcome = yield
            if outcome.error is not None:
                self._rank.step(
                    lambda ledger: ledger.updates.abandon_session(role.name), then="note"
                )
            else:
                self._rank.step(
                    lambda ledger: ledger.updates.set_phase("wait", role.name), then="note"
                )

    def end_session(self, call: Call) -> Around:
        """The session is over, and weights that were unpacked for it are packed again."""
        role = self._rank.role(call.owner)
        if role is not None:
            self._rank.step(
                lambda ledger: ledger.updates.set_phase("post_process", role.name), then="note"
            )
        outcome = yield
        if role is not None:
            run_post_load = bool(call.argument("run_post_load"))
            self._rank.step(
                lambda ledger: ledger.updates.end_session(
                    role.name, error=outcome.raised, run_post_load=run_post_load
                )
            )

    def request(self, call: Call) -> Around:
        """A request of the scheduler: where updates of several calls or runners end."""
        flush_cache = bool(call.requested("flush_cache"))
        version = str(call.requested("weight_version") or "")
        selector = str(call.requested("selector") or "all")  # Of 0.5.21 and later.
        self._holds.begin()
        self._rank.step(
            lambda ledger: ledger.updates.begin_request(
                source=call.target.source,
                flush_cache=flush_cache,
                weight_version=version,
                selector=selector,
            ),
            then="",
        )
        outcome = yield
        succeeded, message = verdict_on(outcome)
        raised = outcome.error is not None
        self._rank.step(
            lambda ledger: ledger.updates.end_request(
                succeeded=succeeded, message=message, raised=raised
            ),
            then="" if succeeded else "note",
        )
        self._holds.end()

    def change_version(self, call: Call) -> Around:
        """SGLang took note of a new weight version, in requests that have tokens of the old one."""
        before = self._rank.inspector.version_events()
        outcome = yield
        version = call.argument("new_version")
        if version is not None and outcome.error is None:
            after = self._rank.inspector.version_events()
            if before is not None and after is not None:
                self._rank.ledger.costs.straddle(after - before)
            self._rank.step(lambda ledger: ledger.updates.change_version(str(version)), then="note")

    def rebalance(self, call: Call) -> Around:
        """A rebalance moves experts layer by layer; all of it is one update."""
        self._rank.step(lambda ledger: ledger.updates.begin_rebalance(), then="")
        yield
        self._rank.step(lambda ledger: ledger.updates.end_rebalance(), then="")

    # The cache that weights leave behind.

    def flush(self, call: Call) -> Around:
        """``Scheduler.flush_cache``, which refuses while requests run or wait."""
        self._rank.arrivals.let_reading_end(UPDATE_FINGERPRINT_SECONDS)
        tokens = self._rank.inspector.begin_flush()
        self._rank.step(Ledger.begin_flush, then="")
        outcome = yield
        succeeded = outcome.error is None and bool(outcome.result)
        if succeeded:
            self._rank.ledger.costs.flush(tokens)
        self._rank.step(lambda ledger: ledger.end_flush(succeeded=succeeded), then="note")

    def pause(self, call: Call) -> Around:
        """Generation is interrupted; mode ``abort`` does not get here, see :meth:`abort`."""
        mode = call.requested("mode")
        if mode in PAUSES:
            self._holds.pause(mode)
        outcome = yield
        if mode in PAUSES and outcome.error is None:
            self._rank.step(lambda ledger: ledger.prefix_cache.pause(mode), then="note")

    def continue_generation(self, call: Call) -> Around:
        """Generation goes on; also where it was not paused."""
        outcome = yield
        if outcome.error is None:
            self._holds.continue_generation()
            self._rank.step(Ledger.continue_generation, then="note")

    def abort(self, call: Call) -> Around | None:
        """Requests are aborted: one that a client gave up, which is nothing to us, or all."""
        return self._abort_all() if call.requested("abort_all") else None

    def _abort_all(self) -> Around:
        self._holds.pause("abort")
        yield
        self._rank.step(lambda ledger: ledger.prefix_cache.pause("abort"), then="note")

    # Memory that is given back and taken again.

    def release(self, call: Call) -> Around:
        """Physical memory goes, addresses stay. Where it failed, nobody knows which. Ranks wait
        for one another in it."""
        self._begin_operation(call)
        self._rank.begin_release()
        outcome = yield
        if outcome.error is None:
            self._rank.release(call.requested("tags"))
        self._end_operation(call, outcome)

    def resume(self, call: Call) -> Around:
        """Physical memory is back."""
        self._begin_operation(call)
        outcome = yield
        if outcome.error is None:
            self._rank.resume(call.requested("tags"))
        self._end_operation(call, outcome)

    def crash(self, call: Call) -> None:
        """``get_exception_traceback``, where the scheduler's process handles what ends it."""
        self._rank.crash(sys.exc_info()[1])

    def run(self, call: Call) -> Around:
        """``run_event_loop``: of Ray's actor nobody asks for the text of what ends it."""
        self._rank.crash((yield).error)

    # What surrounds an update. It may wait for others, so it has a beginning as well.

    def group(self, call: Call) -> Around:
        """A process group for distributed updates is made or destroyed."""
        self._begin_operation(call)
        outcome = yield
        if verdict_on(outcome)[0]:
            is_open = call.target.name == "init_weights_update_group"
            name = str(call.argument("group_name"))
            self._rank.step(
                lambda ledger: ledger.counters.set_group(name, is_open=is_open), then=""
            )
        self._end_operation(call, outcome)

    def operate(self, call: Call) -> Around:
        """Weights are read, saved or sent, or ranks wait for one another."""
        self._begin_operation(call)
        self._end_operation(call, (yield))
        self._holds.end()

    def read(self, call: Call) -> Around:
        """``get_weights_by_name``, which logs an error and answers with nothing."""
        self._begin_operation(call)
        outcome = yield
        self._end_operation(call, outcome, failed=outcome.result is None)

    def check(self, call: Call) -> Around:
        """``check_weights``; its action ``reset_tensors`` overwrites the weights."""
        self._begin_operation(call)
        if call.argument("action") == "reset_tensors":
            outcome = yield from self._write(call, "external", "call", announced=True)
            self._holds.end()
        else:
            outcome = yield
            if outcome.error is None and (role := self._rank.role(call.owner)) is not None:
                self._rank.read_again(role)
        self._end_operation(call, outcome)

    def verify(self, call: Call) -> Around | None:
        """``Scheduler.set_internal_state``, which refuses what it does not know and does nothing
        then: so `verify` asks for fingerprints, between two batches."""
        requested = call.requested("server_args")
        if not isinstance(requested, dict) or PART not in requested:
            return None
        return self._verify(int(requested[PART]), int(requested.get(PARTS, 1)))

    def _verify(self, part: int, parts: int) -> Around:
        with unlogged(PART):
            yield
        self._rank.step(lambda ledger: ledger.updates.finish_idle(), then="")
        complete = [self._rank.read_again(role, part, parts) for role in self._rank.roles]
        if any(complete):
            self._rank.step(lambda ledger: None)

    def lora(self, call: Call) -> Around:
        """An adapter is loaded or unloaded."""
        self._begin_operation(call)
        outcome = yield
        if (role := self._rank.role(call.owner)) is not None:
            self._rank.capture(role, pools=True)
        self._end_operation(call, outcome)

    def _begin_operation(self, call: Call) -> None:
        operation = call.operation
        self._rank.step(lambda ledger: ledger.counters.begin_operation(operation), then="note")

    def _end_operation(self, call: Call, outcome: Outcome, *, failed: bool = False) -> None:
        operation, failed = call.operation, failed or not verdict_on(outcome)[0]
        self._rank.step(lambda ledger: ledger.counters.end_operation(operation, failed=failed))
