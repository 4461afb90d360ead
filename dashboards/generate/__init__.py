# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the Grafana dashboard and the Kubernetes form of the rules.

What is asked of Prometheus is in `promql`, how a panel looks in `grafana`, and each row of the
dashboard is a module in `rows`. `board` sets the rows together.

The dashboard is plain data in Grafana's own JSON model (schema 38, Grafana 10.0), so that what is
here is what Grafana's documentation describes; the tests check it against Grafana's types and draw
it with Grafana's panels. Every query reads raw series: the recording rules are not needed for it.
"""
