# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Who is told what this process knows: the store's files, and through them the exporter process.

Nothing here raises, and nothing that fails here changes what is believed to have happened.
"""
