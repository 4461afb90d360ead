# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Spans and metrics to an OpenTelemetry collector, where ``OTEL_*`` asks for it.

``settings`` chooses, ``telemetry`` starts and stops, ``collector`` is the connection of one signal;
``spans`` are built from events and ``delivery`` sends them; ``metrics`` are those of ``/metrics``.
"""
