"""Real ranks that open a data set: rank 0 alone reads the manifest, and a node keeps it once."""

import json
import sys
from pathlib import Path

import pytest
from web import serve

from shards.format.manifest import read_manifest
from uniemox_dist.distributed.local_launcher import run_ranks

RANK = """
import json, os, sys
from dataclasses import astuple
from pathlib import Path
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.shared_manifests import read_shared_manifests
from uniemox_dist.data.sources import Sources, list_places
from uniemox_dist.distributed import collectives, node_memory
from uniemox_dist.distributed.world import World

out, data, mode = sys.argv[1:]
world = World.from_env()
device = collectives.init(world, 60)
# Apart, as in containers, every rank has a memory of its own.
node_memory.FOLDER = Path(out, str(world.rank) if mode == "apart" else "memory")
if mode != "full":
    node_memory.FOLDER.mkdir(exist_ok=True)
config = load_config("demo", [f"data.path={data}", "batch.streams=12", "batch.global_batch=24"])
opened = []
sys.addaudithook(lambda event, a: event == "open" and str(a[0]).endswith("manifest.json") and opened.append(a[0]))
facts = {}
try:
    manifests = read_shared_manifests(list_places(config), world, device)
    sources = Sources(config, rank=world.rank, world_size=world.size, manifests=manifests)
    plan = sources.plan
    facts = {
        "identity": sources.identity,
        "samples": sources.samples,
        "bytes": sources.bytes,
        "provenance": manifests[0].provenance,
        "shards": [list(astuple(shard)) for shard in manifests[0].shards],
        "order": [list(map(int, astuple(plan.locate(slot)))) for slot in range(200)],
        "kind": type(manifests[0].shards.content.obj).__name__,
    }
except UserError as error:
    facts = {"error": str(error)}
facts["opened"] = len(opened)
facts["left"] = os.listdir(node_memory.FOLDER) if mode != "full" else []
Path(out, f"{world.rank}.json").write_text(json.dumps(facts))
collectives.close()
"""


def open_in_ranks(out: Path, data: Path | str, mode: str, ranks: int = 3) -> list[dict[str, object]]:
    assert run_ranks([sys.executable, "-c", RANK, str(out), str(data), mode], ranks, gpus=False) == 0
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("mode", ["shared", "apart", "full"])
def test_one_rank_reads_the_manifest_and_all_have_the_same_data(
    tmp_path: Path, tiny_data: Path, mode: str
) -> None:
    data = tiny_data / "train"
    [alone] = open_in_ranks(tmp_path, data, "shared", ranks=1)
    manifest = read_manifest(data)
    assert (alone["identity"], alone["samples"], alone["bytes"]) == (
        manifest.identity,
        manifest.samples,
        manifest.bytes,
    )
    (tmp_path / "ranks").mkdir()
    found = open_in_ranks(tmp_path / "ranks", data, mode)
    assert [facts.pop("opened") for facts in found] == [1, 0, 0]
    kinds = {
        "shared": ["mmap"] * 3,
        "apart": ["mmap", "bytearray", "bytearray"],
        "full": ["mmap", "bytearray", "bytearray"],
    }
    assert [facts.pop("kind") for facts in found] == kinds[mode]
    del alone["opened"], alone["kind"]
    assert found == [alone] * 3  # the same order and identity, and nothing left in the node's memory


def test_the_manifest_of_a_remote_data_set_is_requested_as_often_as_by_one_rank(
    tmp_path: Path, tiny_data: Path
) -> None:
    requests = []
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
        with serve(tiny_data / "train") as web:
            found = open_in_ranks(tmp_path / str(ranks), web.url, "shared", ranks=ranks)
        assert [facts["samples"] for facts in found] == [read_manifest(tiny_data / "train").samples] * ranks
        requests.append([name for name, _, _ in web.asked].count("manifest.json"))
    assert requests[0] == requests[1] > 0


def test_a_missing_data_set_is_reported_by_one_rank(tmp_path: Path) -> None:
    first, *others = open_in_ranks(tmp_path, tmp_path / "none", "shared")
    assert first["error"] == (
        f"data.path={tmp_path}/none: no such folder; build it with `uniemox shards pack`"
    )
    assert [facts["error"] for facts in others] == ["", ""]


def test_a_damaged_manifest_is_reported_by_one_rank(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{")
    first, *others = open_in_ranks(tmp_path, tmp_path / "data", "shared")
    assert str(first["error"]).startswith(f"{tmp_path}/data/manifest.json: not a readable manifest")
    assert [facts["error"] for facts in others] == ["", ""]
