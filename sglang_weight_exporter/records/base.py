# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What all records share."""

from __future__ import annotations

import msgspec

#: Raised when a reader of the previous version could misread a file. Files of another version
#: are reported and left alone.
SCHEMA_VERSION = 1


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all records: immutable, named fields, unknown fields ignored on reading.

    None refers to itself, so Python's garbage collector has nothing to do with them.
    """
