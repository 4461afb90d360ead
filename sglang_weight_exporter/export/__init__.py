# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""From the store to Prometheus and OpenTelemetry, in a process of its own without torch.

Only ``exporter_process`` is imported by the engine process: it keeps that process alive.
"""
