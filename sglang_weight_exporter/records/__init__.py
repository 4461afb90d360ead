# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""The data model: what a rank knows about its weights and KV pool, as files carry it.

Every room shares these records and they import none of the rooms. All are frozen. Bytes are
bytes, times are Unix seconds (floats), durations are seconds. A value that could not be read is
``None`` or missing from its list, never zero. One module a subject; ``snapshot``, ``event`` and
``endpoint`` are what files hold.
"""
