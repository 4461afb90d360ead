# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
from serving import rank, runtime_dir, serve

__all__ = ["rank", "runtime_dir", "serve"]
