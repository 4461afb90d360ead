# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What ``sglang-weight-exporter run`` puts on PYTHONPATH: Python imports it when it starts.

In site-packages the ``.pth`` does the same. Where that cannot be written, only PYTHONPATH reaches
every process of an engine, those that it spawns included. A ``sitecustomize`` that was there
before is run as well.
"""

from sglang_weight_exporter_start import (  # type: ignore[import-not-found]
    arm,
    run_the_other,
)

arm()
run_the_other("sitecustomize")
