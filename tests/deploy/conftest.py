# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from kubernetes_programs import Program, program


@pytest.fixture(scope="session")
def kubectl() -> Program:
    return program("kubectl")


@pytest.fixture(scope="session")
def helm() -> Program:
    return program("helm")
