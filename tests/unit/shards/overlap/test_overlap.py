"""`uniemox shards overlap`, its file and page, and `select --without-overlap`."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from skimage import data

from shards.format.manifest import read_manifest
from shards.format.rejected import read_rejected
from shards.overlap import candidates, find
from shards.overlap.pairs import ComparedSet, Overlap, Pair, Sample, choose_dropped, read_pairs
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER

PHOTOS = ("astronaut", "chelsea", "coffee", "camera", "rocket")
HOSTILE = "<img src=x onerror=alert(1)>"


def save(picture: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with two splits: five photographs and their copies, and a second data set with a mirrored one."""
    base = tmp_path_factory.mktemp("overlap")
    photos = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOS}
    for name in PHOTOS[:2]:
        save(photos[name], base / "src/test/a" / f"{name}.jpg", quality=92)
    for name in PHOTOS[2:]:
        save(photos[name], base / "src/train/a" / f"{name}.jpg", quality=92)
    cat = photos["chelsea"]
    save(cat.resize((cat.width // 2, cat.height // 2)), base / "src/train/a/small-cat.jpg", quality=80)
    cup = photos["coffee"]
    save(cup.crop((20, 10, cup.width, cup.height)), base / "src/train/a/cut-cup.png")
    pack(PackSettings(str(base / "src"), "folder", persons="none"), base / "set")
    save(ImageOps.mirror(photos["astronaut"]), base / "src2/a/turned.jpg", quality=90)
    save(photos["camera"], base / "src2/a/camera.jpg", quality=92)
    pack(PackSettings(str(base / "src2"), "folder", persons="none"), base / HOSTILE.replace("/", ""))
    return base


def found(path: Path) -> set[tuple[str, str, str]]:
    """(kept data set, data set of the copy, kind)."""
    overlap = read_pairs(path, "FILE")
    titles = [one.title for one in overlap.sets]
    return {(titles[p.kept.set], titles[p.copy.set], p.kind) for p in overlap.pairs}


def test_finds_copies_within_and_across_splits_and_data_sets(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "all.parquet"
    assert (
        run(["shards", "overlap", str(folder / HOSTILE), str(folder / "set"), "--out", str(out)]) == EXIT_DONE
    )
    assert found(out) == {
        ("set/test", "set/train", "resized"),
        ("set/train", "set/train", "cropped"),
        ("set/test", HOSTILE, "mirrored"),
        ("set/train", HOSTILE, "bytes"),
    }
    said = capsys.readouterr().out
    assert "set/test: 2 samples, 0 of them near-copies of each other" in said
    assert "  1 have a near-copy in set/train" in said
    assert f"{out}: 4 pairs" in said
    row = pq.read_table(out).to_pylist()[0]
    table = pq.read_table(
        folder / "set" / row["copy_split"] / "index" / row["copy_shard"].replace(".tar", ".parquet")
    )
    assert table["key"][row["copy_row"]].as_py() == row["copy_key"]


def test_the_file_does_not_depend_on_the_workers(folder: Path) -> None:
    files = []
    for workers in ("0", "2"):
        out = folder / f"w{workers}.parquet"
        assert (
            run(["shards", "overlap", str(folder / "set"), "--out", str(out), "--workers", workers])
            == EXIT_DONE
        )
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert not list(folder.glob(".overlap-*"))


def test_the_page_escapes_names_and_runs_nothing(folder: Path) -> None:
    out, page = folder / "page.parquet", folder / "page.html"
    command = [
        "shards",
        "overlap",
        str(folder / "set"),
        str(folder / HOSTILE),
        "--out",
        str(out),
        "--page",
        str(page),
    ]
    assert run(command) == EXIT_DONE
    text = page.read_text()
    assert HOSTILE not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert not re.search(
        r"<script|\son\w+=[^&]*>|javascript:", text.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    )
    assert "default-src 'none'" in text
    scores = [float(score) for score in re.findall(r"score ([\d.]+),", text)]
    assert len(scores) == 4
    assert scores == sorted(scores)


def test_select_drops_copies_of_the_test_split_and_lists_them(folder: Path) -> None:
    out = folder / "drop.parquet"
    assert run(["shards", "overlap", str(folder / "set"), "--out", str(out)]) == EXIT_DONE
    clean = folder / "clean"
    select = ["shards", "select", str(folder / "set/train"), str(clean), "--without-overlap", str(out)]
    assert run(select) == EXIT_DONE
    assert read_manifest(clean).samples == 3
    rejected = read_rejected(clean)
    assert rejected is not None
    assert {row["reason"] for row in rejected} == {"overlap"}
    assert sorted(row["detail"].split(",")[0] for row in rejected) == [
        "cropped: set/train",
        "resized: set/test",
    ]
    again = folder / "again.parquet"
    assert run(["shards", "overlap", str(folder / "set/test"), str(clean), "--out", str(again)]) == EXIT_DONE
    assert found(again) == set()


def test_a_sample_stays_if_its_only_twin_is_dropped() -> None:
    sets = (ComparedSet("a", "train", "id", 3),)
    sides = [Sample(0, key, "000000.tar", row) for row, key in enumerate("xyz")]
    pairs = (Pair(sides[0], sides[1], "resized", 0.9, 1.0), Pair(sides[1], sides[2], "resized", 0.9, 1.0))
    assert list(choose_dropped(Overlap(sets, pairs), "id", "FILE")) == ["y"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{base}/nothing"], "nothing: no such folder"),
        (["{base}/set", "{base}/set/train"], "is the same data set as"),
        (["{base}/set", "--out", "{base}/x.csv"], "ends with .parquet"),
        (["{base}/set", "--page", "{base}/x.txt"], "ends with .html"),
    ],
)
def test_a_wrong_argument_is_one_line(
    folder: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "overlap", *(text.format(base=folder) for text in arguments)]) == EXIT_USER
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_select_refuses_a_file_of_other_data_and_another_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "other.parquet"
    assert run(["shards", "overlap", str(folder / "set/test"), "--out", str(out)]) == EXIT_DONE
    for file, says in (
        (out, "DIR is none of the data sets"),
        (folder / "set/rejected.parquet", "lacks the columns"),
    ):
        command = [
            "shards",
            "select",
            str(folder / "set/train"),
            str(folder / "no"),
            "--without-overlap",
            str(file),
        ]
        assert run(command) == EXIT_USER
        assert says in capsys.readouterr().err
    assert not (folder / "no").exists()


def test_landmarks_find_what_comparing_all_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = find.open_sets([folder / "set", folder / HOSTILE])
    everything = find.find_pairs(sets).pairs
    monkeypatch.setattr(candidates, "ALL_AT_ONCE", 0)
    monkeypatch.setattr(candidates, "BLOCK", 8)
    assert find.find_pairs(sets).pairs == everything
    assert len(everything) == 4
