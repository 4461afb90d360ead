# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Formats are taken by the programs that they are for: Mooncake, NIXL, pyarrow and SGLang itself.

The memory is this process's own, captured from a torch model as an engine's is.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from engines import Installation
from http_servers import Handler, LocalServer
from published import Command, PublishedRank
from waiting import LIMIT

from sglang_weight_exporter.cli.formats import as_nixl
from sglang_weight_exporter.weight_table import Region

REASON = "needs {}: `make test` installs it (dependency group `consumers`)"


def needed(module: str) -> ModuleType:
    if os.environ.get("CI"):
        return __import__(module, fromlist=["_"])
    return pytest.importorskip(module, reason=REASON.format(module), exc_type=ImportError)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> Any:
    """Some memory: two layers, a tied head, a scale."""
    torch = pytest.importorskip("torch", reason="needs torch, which comes with SGLang")
    made = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 300, bias=False))
    made.head = torch.nn.Module()
    made.head.weight = made[0].weight
    made.register_buffer("scale", torch.ones(77))
    return made.to(torch.bfloat16)


@pytest.fixture
def published(model: Any, runtime_dir: Path) -> Iterator[PublishedRank]:
    from sglang_weight_exporter.capture.weights import capture_weights

    rank = PublishedRank(runtime_dir, device="cpu")
    rank.publish(table=capture_weights(model, role="target", captured_at=1.0).table)
    yield rank
    rank.store.close()


def tensors(model: Any) -> dict[str, Any]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])


@pytest.mark.usefixtures("published")
def test_mooncake_registers_the_regions_and_transfers_from_them(
    command: Command, model: Any
) -> None:
    engine_module = needed("mooncake.engine")
    torch = needed("torch")
    regions = json.loads(command("table", "--format", "mooncake").stdout)
    assert sum(regions["lens"]) == 2 * (300 * 200 + 200 + 200 * 300 + 77)  # The tied head once.
    seed, client = engine_module.TransferEngine(), engine_module.TransferEngine()
    for engine in (seed, client):
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert seed.batch_register_memory(regions["addrs"], regions["lens"]) == 0
    weight = model[1].weight
    received = torch.zeros_like(weight)
    size = received.nbytes
    assert client.register_memory(received.data_ptr(), size) == 0
    seed_name = f"127.0.0.1:{seed.get_rpc_port()}"
    read = client.batch_transfer_sync_read(
        seed_name, [received.data_ptr()], [weight.data_ptr()], [size]
    )
    assert read == 0
    assert torch.equal(received, weight)
    assert seed.batch_unregister_memory(regions["addrs"]) == 0


@pytest.mark.usefixtures("published")
def test_nixl_registers_the_regions(command: Command) -> None:
    nixl = needed("nixl_cu12._api")
    (memory_type, descriptors), *others = json.loads(
        command("table", "--format", "nixl").stdout
    ).items()
    assert (memory_type, others) == ("DRAM", [])
    agent = nixl.nixl_agent("engine", nixl.nixl_agent_config(backends=["UCX"]))
    registered = agent.register_memory([tuple(entry) for entry in descriptors], memory_type)
    assert registered.descCount() == len(descriptors) == 4
    agent.deregister_memory(registered)


def test_nixl_is_told_which_memory_is_on_which_gpu() -> None:
    regions = [Region(4096, 64, "cuda:1"), Region(8192, 8, "cpu"), Region(12288, 8, "cuda:0")]
    assert json.loads(as_nixl(regions)) == {
        "VRAM": [[4096, 64, 1, ""], [12288, 8, 0, ""]],
        "DRAM": [[8192, 8, 0, ""]],
    }


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("regions", [(), ("--regions",)], ids=["tensors", "regions"])
def test_pyarrow_reads_parquet(command: Command, model: Any, regions: tuple[str, ...]) -> None:
    parquet = needed("pyarrow.parquet")
    content = command("table", "--format", "parquet", *regions).stdout
    table = parquet.read_table(io.BytesIO(content)).to_pylist()
    if regions:
        assert sum(row["nbytes"] for row in table) == 2 * (300 * 200 + 200 + 200 * 300 + 77)
        assert set(table[0]) == {"data_ptr", "nbytes", "device"}
        return
    assert {row["name"]: int(row["data_ptr"], 16) for row in table} == {
        name: tensor.data_ptr() for name, tensor in tensors(model).items()
    }
    assert {row["name"]: row["shape"] for row in table} == {
        name: list(tensor.shape) for name, tensor in tensors(model).items()
    }


@pytest.mark.usefixtures("published")
def test_an_empty_selection_is_an_empty_parquet_file(command: Command) -> None:
    parquet = needed("pyarrow.parquet")
    content = command("table", "--format", "parquet", "--filter", "nothing").stdout
    table = parquet.read_table(io.BytesIO(content))
    assert table.num_rows == 0
    assert table.schema.names[:2] == ["name", "data_ptr"]


#: Runs where SGLang is: its own loader fills a model of the same shape from another process.
LOAD = """
import sys, torch
from mooncake.engine import TransferEngine
from sglang.srt.model_loader import loader
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 300, bias=False))
model = model.to(torch.bfloat16)
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
for parameter in model.parameters():
    assert engine.register_memory(parameter.data_ptr(), parameter.nbytes) == 0
load = loader.RemoteInstanceModelLoader.load_model_from_remote_instance_by_transfer_engine
assert load(None, model, engine, sys.argv[1], 0)
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.mark.release("launches")
@pytest.mark.usefixtures("published")
def test_sglangs_remote_instance_loader_reads_the_weights(
    command: Command, model: Any, newest: Installation, tmp_path: Path
) -> None:
    torch = needed("torch")
    seed = needed("mooncake.engine").TransferEngine()
    assert seed.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    regions = json.loads(command("table", "--format", "mooncake").stdout)
    assert seed.batch_register_memory(regions["addrs"], regions["lens"]) == 0
    weights = json.loads(command("table", "--format", "sglang-remote").stdout)
    answer = json.dumps(
        {"remote_instance_transfer_engine_info": [f"127.0.0.1:{seed.get_rpc_port()}", weights]}
    ).encode()

    class SeedInstance(Handler):
        def do_GET(self) -> None:
            self.reply(answer)

    state = tmp_path / "state"
    with LocalServer(SeedInstance) as server:
        ran = subprocess.run(
            [newest.python, "-c", LOAD, server.url, state],
            env=newest.environment(SGLANG_WEIGHT_EXPORTER_DISABLED="1"),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    loaded = torch.load(state)
    assert set(loaded) == {"0.weight", "0.bias", "1.weight"}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, tensors(model)[name]), name


def test_without_pyarrow_parquet_says_what_to_do(rank: PublishedRank) -> None:
    program = (
        "import sys\n"
        "sys.modules['pyarrow'] = None\n"
        "from sglang_weight_exporter.cli import main\n"
        "sys.exit(main(['table', '--format', 'parquet', '--runtime-dir', sys.argv[1]]))\n"
    )
    path = rank.store.runtime_dir.path
    ran = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=LIMIT
    )
    assert ran.returncode == 2
    assert "pip install pyarrow" in ran.stderr
