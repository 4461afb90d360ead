# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's model runners: which role, engine and rank they are, and what they hold.

Knows where SGLang's releases keep these things. Reads and never writes.
"""
