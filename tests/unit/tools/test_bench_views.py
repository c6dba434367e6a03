"""The benchmarks of views: absent libraries are named, peers deliver whole batches, differences are counted exactly."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

import bench_loader
import bench_resize
import loader_peers

from shards.format.manifest import read_manifest
from uniemox_dist.data.crops import View


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 32 JPEGs."""
    from PIL import Image
    from skimage import data

    from shards.pack.pipeline import PackSettings, pack

    folder = tmp_path_factory.mktemp("photos")
    picture = Image.fromarray(data.astronaut())
    bench_loader.write_photos([picture], folder / "a/x", 96, 32, 85)
    pack(PackSettings(str(folder / "a"), "folder", persons="none", shard_samples=16), folder / "shards")
    return folder / "shards"


def test_each_library_is_a_row_or_named_as_missing(capsys: pytest.CaptureFixture[str]) -> None:
    ways = bench_loader.list_ways()
    lines = capsys.readouterr().out.splitlines()
    for name, (module, _) in loader_peers.PEERS.items():
        if importlib.util.find_spec(module) is None:
            assert f"{name}: is not installed; left out" in lines
        else:
            assert name in ways
    assert "webdataset" in ways
    assert next(iter(ways)) == bench_loader.OURS
    assert list(ways)[-1] == bench_loader.LIMIT


@pytest.mark.parametrize("name", ["grain", "mosaicml-streaming", "spdl", "webdataset"])
def test_a_peer_delivers_whole_batches_of_two_views_without_end(name: str, photos: Path) -> None:
    module, make = loader_peers.PEERS[name]
    pytest.importorskip(module)
    batches = make(photos)
    sizes = [next(batches) for _ in range(2)]
    batches.close()  # type: ignore[attr-defined]
    assert sizes == [loader_peers.MICRO_BATCH] * 2


def test_peers_draw_views_of_the_pictures_in_the_shards(photos: Path) -> None:
    places = loader_peers.list_pictures(photos)
    assert len(places) == sum(entry.samples for entry in read_manifest(photos).shards) == 32
    jpegs = [loader_peers.read_picture(place) for place in places]
    assert all(jpeg[:2] == b"\xff\xd8" and jpeg[-2:] == b"\xff\xd9" for jpeg in jpegs)
    views = loader_peers.draw_views(jpegs[0])
    assert (views.shape, views.dtype) == ((2, 224, 224, 3), torch.uint8)
    [whole] = bench_resize.render_views(jpegs[0], [View((0, 0, 96, 96))])
    person = views[1].permute(2, 0, 1)
    assert torch.equal(person, whole) or torch.equal(person, whole.flip(-1))


def test_differences_are_their_mean_their_percentile_and_the_largest() -> None:
    exact = torch.zeros((3, 20, 100), dtype=torch.uint8)
    other = exact.clone()
    other.view(-1)[:12] = torch.arange(1, 13, dtype=torch.uint8)  # 0.2 % of 6,000 values
    found = bench_resize.compare([exact], [other])
    assert found == {"mean": pytest.approx(78 / 6000), "p99.9": 6, "max": 12}
