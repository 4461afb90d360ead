# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""One module a row of panels: what a panel is called, what it asks and how it is drawn."""
