"""Checking shards that lie there, and putting bad ones aside; and the page and numbers about them."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards.format.index import index_path, read_all_rows, to_rows, write_index
from shards.format.manifest import read_manifest
from shards.inspect.charts import histogram
from shards.inspect.page import write_page
from shards.inspect.stats import Tally, describe_json, summarise
from shards.inspect.verify import quarantine, verify
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER
from uniemox_dist.data.reader import ShardReader


@pytest.fixture
def copy(photo_shards: Path, tmp_path: Path) -> Path:
    """20 pictures in three shards, ours to damage."""
    return Path(shutil.copytree(photo_shards, tmp_path / "data"))


def problems(folder: Path, **options: object) -> dict[str, list[str]]:
    verdicts = verify([folder], **options)  # type: ignore[arg-type]
    return {verdict.shard: list(verdict.problems) for verdict in verdicts if verdict.problems}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(bytes(content))


def place(folder: Path, shard: str, row: int) -> dict[str, object]:
    return to_rows(read_all_rows(index_path(folder, shard)))[row]


@pytest.mark.parametrize("workers", [0, 2])
def test_intact_shards_have_no_problem(workers: int, photo_shards: Path) -> None:
    verdicts = verify([photo_shards], workers=workers)
    assert [(verdict.shard, verdict.samples, verdict.problems) for verdict in verdicts] == [
        ("000000.tar", 8, ()),
        ("000001.tar", 8, ()),
        ("000002.tar", 4, ()),
    ]


def test_pictures_that_two_splits_have_in_common_are_counted(
    photo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        shutil.copytree(photo_shards, tmp_path / "data" / split)
    report = tmp_path / "verify.json"
    assert run(["shards", "verify", str(tmp_path / "data"), "--json", str(report)]) == EXIT_DONE
    assert "20 pictures of train occur in val, too" in capsys.readouterr().out
    common = [{"splits": ["train", "val"], "pictures": 20}]
    assert json.loads(report.read_text(encoding="utf-8"))["common_pictures"] == common


def test_a_changed_picture_is_named_by_its_key(copy: Path) -> None:
    row = place(copy, "000001.tar", 3)
    flip(copy / "000001.tar", int(row["image_offset"]) + 200)  # type: ignore[call-overload]
    found = problems(copy)
    assert list(found) == ["000001.tar"]
    assert found["000001.tar"][0] == "its bytes have changed since packing (SHA-256)"
    assert found["000001.tar"][1].startswith(f"{row['key']}: the picture's bytes do not match the index")


def test_every_kind_of_damage_is_reported(copy: Path) -> None:
    tar = copy / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    index_path(copy, "000001.tar").unlink()
    (copy / "000002.tar").unlink()
    (copy / "stray.tar").write_bytes(b"")
    found = problems(copy)
    assert found["000000.tar"][0].startswith("has ")
    assert (
        "its picture is beyond the end" in found["000000.tar"][1]
        or "do not match the index" in found["000000.tar"][1]
    )
    assert found["000001.tar"] == ["its index is missing"]
    assert found["000002.tar"] == ["the tar is missing"]
    assert found["stray.tar"] == ["is in the folder, but not in the manifest"]


def test_an_index_of_another_tar_does_not_fit(copy: Path) -> None:
    shutil.copy(index_path(copy, "000001.tar"), index_path(copy, "000000.tar"))
    found = problems(copy)["000000.tar"]
    assert found[0] == "its index is not the one that was written (SHA-256)"
    assert found[1] == "the rows of its index do not match the manifest's hash"
    assert any("do not match the index" in text or "beyond the end" in text for text in found[2:])
    assert found[-1] == "and 3 more damaged samples"


def test_an_index_with_a_row_less_or_other_sides_is_reported(copy: Path) -> None:
    rows = to_rows(read_all_rows(index_path(copy, "000000.tar")))
    rows[1]["width"] += 1
    write_index(index_path(copy, "000000.tar"), rows[:-1])
    found = problems(copy)["000000.tar"]
    assert "its index has 7 samples instead of 8" in found
    assert any(text.startswith(f"{rows[1]['key']}: is ") for text in found)
    index_path(copy, "000000.tar").write_bytes(b"no parquet")
    assert any("its index cannot be read" in text for text in problems(copy)["000000.tar"])


def test_quarantine_leaves_a_data_set_that_can_be_read(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = read_manifest(copy)
    flip(copy / "000001.tar", 600)
    assert (
        run(["shards", "verify", str(copy), "--quarantine", "--json", str(copy / "found.json")]) == EXIT_USER
    )
    out = capfd.readouterr().out
    assert f"{copy}/000001.tar: its bytes have changed since packing" in out
    assert "12 samples are left" in out
    findings = json.loads((copy / "found.json").read_text())
    assert (findings["shards"], findings["bad"]) == (3, 1)
    manifest = read_manifest(copy)
    assert [entry.name for entry in manifest.shards] == ["000000.tar", "000002.tar"]
    assert manifest.identity != before.identity
    assert manifest.provenance["quarantined"] == ["000001.tar"]
    assert json.loads((copy / "sizes.json").read_text()) == {"000000.tar": 8, "000002.tar": 4}
    assert (copy / "quarantine/000001.tar").is_file()
    assert (copy / "quarantine/index/000001.parquet").is_file()
    assert run(["shards", "verify", str(copy)]) == EXIT_DONE
    assert ShardReader.from_folder(copy, "data.path").read(1, 0).image


def test_nothing_is_left_when_every_shard_is_bad(copy: Path) -> None:
    for tar in copy.glob("*.tar"):
        flip(tar, 600)
    assert quarantine(verify([copy])) == {copy: None}
    assert not (copy / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["newer", "foreign", "missing"])
def test_manifests_that_cannot_be_read_end_with_2(
    kind: str, copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((copy / "manifest.json").read_text())
    says = {
        "newer": 'format "uniemox-shards" 3 is not readable by this version',
        "foreign": "not a readable manifest",
    }
    if kind == "newer":
        (copy / "manifest.json").write_text(json.dumps({**record, "format_version": 3}))
    elif kind == "foreign":
        (copy / "manifest.json").write_text("{}")
    else:
        (copy / "manifest.json").unlink()
    for command in ("verify", "stats", "report"):
        assert run(["shards", command, str(copy)]) == EXIT_USER
        error = capfd.readouterr().err
        assert says.get(kind, "has no manifest.json") in error
        assert "Traceback" not in error
    assert not (copy / "report.html").exists()


# ---- numbers and the page


def test_the_numbers_are_those_of_the_pictures(photo_shards: Path) -> None:
    summary = summarise(photo_shards)
    assert dict(summary.labels) == {"people": 8, "things": 12}
    assert (summary.captions, summary.captionless, summary.with_person) == (10, 10, 0)
    sides = summary.tallies["short"]
    assert sides.values.tolist() == [120, 180, 200]
    assert [int(sides.counts[v]) for v in sides.values] == [5, 10, 5]
    assert (sides.quantile(0), sides.quantile(0.5), sides.quantile(1)) == (120, 180, 200)
    [record] = describe_json(photo_shards)["data_sets"]
    assert record["least_median_most"]["long"] == [200, 240, 320]


def test_the_page_holds_every_label_and_its_pictures(tiny_data: Path, tmp_path: Path) -> None:
    write_page(tiny_data, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 20
    for label in summarise(tiny_data / "train").labels:
        assert f"<h3>{label} " in page
    for split in ("train", "test"):
        assert read_manifest(tiny_data / split).identity[:12] in page
    assert (
        str(tiny_data) not in page.replace(str(tiny_data / "table.parquet"), "").split("How it was made")[0]
    )
    again = tmp_path / "again.html"
    write_page(tiny_data, again)
    assert again.read_text(encoding="utf-8") == page


def test_the_page_escapes_foreign_texts_and_survives_damage(tmp_path: Path) -> None:
    from skimage import data

    from shards.pack.pipeline import PackSettings, pack

    evil = "<script>alert(1)</script>"
    folder = tmp_path / "in" / evil.replace("/", "")
    folder.mkdir(parents=True)
    from PIL import Image

    Image.fromarray(data.chelsea()).resize((60, 40)).save(folder / "a.jpg")
    (folder / "a.txt").write_text(evil)
    (folder / "b.jpg").write_bytes(evil.encode())
    pack(PackSettings(str(tmp_path / "in"), "folder", persons="none"), tmp_path / "out")
    row = place(tmp_path / "out", "000000.tar", 0)
    flip(tmp_path / "out/000000.tar", int(row["image_offset"]))  # type: ignore[call-overload]
    assert run(["shards", "report", str(tmp_path / "out")]) == EXIT_DONE
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "cannot be shown: corrupt" in page
    assert pq.read_table(tmp_path / "out/rejected.parquet").num_rows == 1
    assert '<td class="reason">corrupt</td>' in page


def test_histograms_count_every_value_once() -> None:
    import numpy as np

    tally = Tally()
    tally.add(np.array([1, 5, 5, 900, 20_000]))
    tally.add(np.array([], np.int64))
    assert (tally.total, tally.quantile(0.5)) == (5, 5)
    found = histogram("t", "u", [tally, Tally()])
    assert found is not None
    assert found.svg.count("<rect") == 4
    assert found.median == "5"
    assert histogram("t", "u", [Tally()]) is None
