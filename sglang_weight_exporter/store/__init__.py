# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Files and locks: what ranks write and everyone else reads.

::

    RUNTIME_DIR/                 mode 0700
      exporter.lock              held by the exporter process
      exporter.json              where its endpoint is
      engines.lock               held while a rank picks its engine's name
      ranks/RANK_ID/
        lock                     held by the rank for as long as it lives
        snapshot                 records.snapshot.Snapshot, replaced atomically
        ROLE-SHA256.table        weight_table.WeightTable, written once
        table.lock               held exclusively by an update, shared by readers of tables
        black_box                records.black_box.BlackBox: out of memory, or ended by an exception
        events/NUMBER-SHA256.event, SHA256.table
      ended/RANK_ID/             the same of ranks that ended in the middle of something, bounded

Liveness is a held lock and never a pid: it survives ``kill -9``, pid reuse, and containers that
share the directory without sharing a pid namespace.
"""
