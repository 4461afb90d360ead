# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What memory holds: tensors of a model and of pools, read with torch, inside the engine process.

Knows torch and nothing of SGLang. Only addresses and sizes are read, never a value: nothing here
launches a kernel or waits for a device, but for the fingerprints that somebody switched on.
"""
