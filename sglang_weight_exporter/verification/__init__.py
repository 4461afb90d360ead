# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What weights should be: checkpoints and manifests, and how what is served differs from them."""
