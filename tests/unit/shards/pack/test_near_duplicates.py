"""`shards pack --near-duplicates`: near-copies among the records of a source are marked or dropped."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from skimage import data

from shards.format.manifest import read_manifest
from shards.format.rejected import read_rejected
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test: a cat. Train: the cat in half the size, coffee, coffee mirrored, a rocket."""
    base = tmp_path_factory.mktemp("near")
    cat, cup, rocket = (Image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee", "rocket"))
    pictures = {
        "test/a/cat": cat,
        "train/a/small-cat": cat.resize((cat.width // 2, cat.height // 2)),
        "train/a/cup": cup,
        "train/a/puc": ImageOps.mirror(cup),
        "train/a/rocket": rocket,
    }
    for name, picture in pictures.items():
        path = base / "src" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    return base / "src"


def command(source: Path, out: Path, *options: str) -> list[str]:
    return ["shards", "pack", str(source), str(out), "--layout", "folder", "--persons", "none", *options]


def attributes(folder: Path) -> dict[str, dict[str, Any]]:
    """Source -> attributes of all samples."""
    found = {}
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    sample = json.load(file)
                    found[sample["source"]] = json.loads(sample["attributes"])
    return found


def test_copies_of_what_is_packed_earlier_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        out = tmp_path / workers
        assert run(command(source, out, "--near-duplicates", "drop", "--workers", workers)) == EXIT_DONE
    assert read_manifest(tmp_path / "0/train").identity == read_manifest(tmp_path / "2/train").identity
    assert read_manifest(tmp_path / "0/test").samples == 1
    manifest = read_manifest(tmp_path / "0/train")
    assert manifest.samples == 2
    assert manifest.provenance["settings"]["near_duplicates"] == "drop"
    assert manifest.provenance["rejected"] == {"near_duplicate": 2}
    rejected = read_rejected(tmp_path / "0")
    assert rejected is not None
    cat, cup = sorted(rejected, key=lambda row: row["detail"], reverse=True)
    assert (cat["source"], cat["detail"]) == (
        "train/a/small-cat.jpg",
        "resized: test/a/cat.jpg of split test",
    )
    assert {cup["source"], cup["detail"]} in (
        {"train/a/puc.jpg", "mirrored: train/a/cup.jpg of split train"},
        {"train/a/cup.jpg", "mirrored: train/a/puc.jpg of split train"},
    )


def test_a_copy_stays_if_its_twin_is_refused_for_another_reason(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = [
        "--keep-side",
        ":200",
        "--near-duplicates",
        "drop",
    ]  # of the cats only the small one is small enough
    assert run(command(source, out, *limits)) == EXIT_DONE
    assert list(attributes(out)) == ["train/a/small-cat.jpg"]


def test_marked_copies_name_their_twin(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(command(source, out, "--near-duplicates", "mark")) == EXIT_DONE
    marked = {name: found for name, found in attributes(out).items() if found}
    assert marked["train/a/small-cat.jpg"] == {
        "near_duplicate_of": "test/a/cat.jpg",
        "near_duplicate_kind": "resized",
    }
    assert len(marked) == 2
    assert len(attributes(out)) == 5


def test_a_pack_that_keeps_them_states_no_new_setting(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(command(source, out)) == EXIT_DONE
    assert "near_duplicates" not in read_manifest(out / "train").provenance["settings"]
    assert sum(read_manifest(out / split).samples for split in ("test", "train")) == 5


def test_an_interrupted_pack_drops_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.pack import pipeline

    settings = PackSettings(str(source), "folder", persons="none", shard_samples=1, near_duplicates="drop")
    pack(settings, tmp_path / "whole")
    finish = pipeline._finish

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_finish", stop)
    with pytest.raises(KeyboardInterrupt):
        pack(settings, tmp_path / "cut")
    monkeypatch.setattr(pipeline, "_finish", finish)
    result = pack(settings, tmp_path / "cut", resume=True)
    assert result.resumed > 0
    for split in ("test", "train"):
        assert (
            read_manifest(tmp_path / "cut" / split).identity
            == read_manifest(tmp_path / "whole" / split).identity
        )
