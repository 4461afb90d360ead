# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What all records share."""

from __future__ import annotations

from typing import Annotated

import msgspec

#: Raised when a reader of the previous version could misread a file. Files of another version
#: are reported and left alone.
SCHEMA_VERSION = 1


# What a value that can be sent looks like. One that cannot costs more than its series: a NaN ends a
# scrape of all ranks. Files are checked against these as they are decoded.

#: A number of things or bytes, in 64 bits with sign, as OTLP has them.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: A time or a duration. Both are sent as nanoseconds; this is until the year 2262.
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=2**63 / 1e9)]
#: Of what becomes a series each: more than any model has, and too few to keep scrapes waiting.
FEW = msgspec.Meta(max_length=1000)
#: Hexadecimal digits, and of the first two none where there is none.
TraceId = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")]
Fingerprint = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
#: torch's name of one, such as ``cuda:0``. Nobody's would be taken for the role's own, which has
#: that name too.
DeviceName = Annotated[str, msgspec.Meta(min_length=1)]
#: Of a file in the rank's directory.
FileName = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]*\Z")]


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all records: immutable, named fields, unknown fields ignored on reading.

    None refers to itself, so Python's garbage collector has nothing to do with them.
    """
