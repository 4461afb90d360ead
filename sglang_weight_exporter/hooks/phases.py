# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang's calls inside an update mean: where its time goes, and what it brings.

The same kind of methods as :class:`~sglang_weight_exporter.hooks.observer.Observer`'s, which has
them too. An update is loading unless one of these says otherwise: releases that have receiving or
post-processing inside of one function with the loading are not told apart.
"""

from __future__ import annotations

from sglang_weight_exporter.capture import update_bytes
from sglang_weight_exporter.hooks.wrapped_call import Around, Call
from sglang_weight_exporter.ledger import Ledger
from sglang_weight_exporter.rank import Rank


class Phases:
    """Translates calls of SGLang that are part of an update."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def receive(self, call: Call) -> Around:
        """Tensors arrive, to be loaded by further calls."""
        role, source = self._rank.role(call.owner), call.target.source
        if role is None or source is None:
            return
        self._rank.step(lambda ledger: ledger.set_phase("receive", role.name))
        outcome = yield
        message = outcome.raised
        if outcome.error is None:
            self._rank.step(lambda ledger: ledger.set_phase("wait", role.name), quietly=True)
        else:
            self._rank.step(lambda ledger: ledger.fail_receiving(role.name, source, message))

    def read_files(self, call: Call) -> Around:
        """``_prepare_weights``, which says what files a checkpoint's tensors are read from."""
        outcome = yield
        if outcome.error is None and self._rank.ledger.writing:
            _, files, _ = outcome.result
            nbytes = update_bytes.of_files(files)
            self._rank.step(lambda ledger: ledger.add_bytes(nbytes), quietly=True)

    def post_process(self, call: Call) -> Around:
        """Weights are unpacked before a load or packed after it, inside the call that loads; in a
        session its beginning and its end do the same."""
        if self._rank.ledger.writing:
            self._rank.step(lambda ledger: ledger.set_phase("post_process"))
            yield
            self._rank.step(lambda ledger: ledger.set_phase("load"), quietly=True)

    def flush(self, call: Call) -> Around:
        """``Scheduler.flush_cache``, which refuses while requests run or wait."""
        self._rank.step(Ledger.begin_flush, quietly=True)
        outcome = yield
        succeeded = outcome.error is None and bool(outcome.result)
        self._rank.step(lambda ledger: ledger.flush(succeeded=succeeded))
