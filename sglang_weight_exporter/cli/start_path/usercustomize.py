# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Python imports it after ``sitecustomize``, where a user's own packages may be used. It is found
only while nobody has armed the hooks: where another ``sitecustomize`` is in front of ours."""

from sglang_weight_exporter_start import (  # type: ignore[import-not-found]
    arm,
    run_the_other,
)

arm()
run_the_other("usercustomize")
