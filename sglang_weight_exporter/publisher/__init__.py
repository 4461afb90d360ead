# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Writes what this process knows into the store's files, from which the exporter process reads it.

Nothing here raises, and nothing that fails here changes what is believed to have happened.
"""
