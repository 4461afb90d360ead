# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Write the Grafana dashboards, and the address of the runbooks into them and the rules.

What is asked of Prometheus is in `queries`, how a panel looks in `grafana`, and each row of
panels is a module in `rows`. `fleet` and `engine` are the two boards that are made of them.

A dashboard is plain data in Grafana's own JSON model (schema 38, Grafana 10.0), so that what is
here is what Grafana's documentation describes; the tests check it against Grafana's types and draw
it with Grafana's panels. Every query reads raw series: the recording rules are not needed for it.
"""

#: Stands for the address of the documents in a link, until the generator is told one: nothing that
#: is shipped leads to an address that it cannot know.
DOCUMENTS = "documents:"
