# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What SGLang does to weights and pools → records, from inside the engine process.

``targets`` says what is hooked, ``install`` hooks it, ``observer`` turns calls into records.
Nothing here raises into SGLang or changes what it returns.
"""
