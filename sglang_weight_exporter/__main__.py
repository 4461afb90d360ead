# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m sglang_weight_exporter``: the same as the command ``sglang-weight-exporter``."""

import sys

from sglang_weight_exporter.cli import main

if __name__ == "__main__":
    sys.exit(main())
