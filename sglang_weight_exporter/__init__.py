# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Weights and KV pool of every SGLang rank, as Prometheus metrics and OpenTelemetry spans.

Importing this package costs next to nothing and imports nothing: Python's start-up does it in
every interpreter of an environment where the package is installed.
"""

__version__ = "0.1.0"
