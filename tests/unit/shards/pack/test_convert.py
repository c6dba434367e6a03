"""Pictures that are not JPEG, PNG or WebP are stored losslessly, with their original format."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import PHOTO, VARIANTS, encoded
from PIL import Image

import shards.pack.packer
from shards.edit.index_tars import index_folder
from shards.format.manifest import read_manifest
from shards.format.sample import parse_record
from shards.pack.pipeline import PackSettings, pack
from shards.pack.shrink import MAX_WEBP_SIDE, Shrink, reencode
from shards.pictures.decode import check_picture, decode_picture
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE
from uniemox_dist.data.reader import ShardReader

KEYS = {name.replace(" ", "-"): data for name, data in VARIANTS.items()}
AS_THEY_ARE = {key for key in KEYS if key.startswith(("jpeg", "mpo", "png", "apng", "webp"))}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formats") / "t.parquet"
    rows = [{"key": key, "image": data, "caption": key} for key, data in KEYS.items()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def settings(table: Path, **more: Any) -> PackSettings:
    return PackSettings(str(table), **{"persons": "none", "shard_samples": 8, **more})


def test_a_pack_of_all_formats_has_the_same_pixels_and_states_the_originals(
    table: Path, tmp_path: Path
) -> None:
    result = pack(settings(table), tmp_path / "out")
    refused = {rejected.source for rejected in result.rejected}
    assert {rejected.reason for rejected in result.rejected} <= {"duplicate"}
    stored = members(tmp_path / "out")
    formats = {}
    for key in set(KEYS) - refused:
        record = parse_record(json.loads(stored[f"{key}.json"]))
        if key in AS_THEY_ARE:
            assert stored[f"{key}.jpg"] == KEYS[key]
            assert record["attributes"] == {}
            continue
        picture = stored[f"{key}.jpg"]
        formats[key] = record["attributes"]["original_format"]
        np.testing.assert_array_equal(decode_picture(picture), decode_picture(KEYS[key]))
        animated = key in ("gif-animated", "avif-animated", "tiff-pages")
        assert record["attributes"].get("original_frames") == (2 if animated else None)
    counts = {form: list(formats.values()).count(form) for form in set(formats.values())}
    assert result.converted == counts
    assert set(counts) == {"AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF"}
    assert read_manifest(tmp_path / "out").provenance["converted"] == dict(sorted(counts.items()))
    assert run(["shards", "verify", str(tmp_path / "out")]) == EXIT_DONE


def test_bytes_do_not_depend_on_the_number_of_workers(table: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 1, 2):
        result = pack(settings(table), tmp_path / str(workers), workers=workers)
        found.append((members(tmp_path / str(workers)), result.converted))
    assert found[0] == found[1] == found[2]


def test_a_resumed_pack_counts_the_conversions_before_the_interruption(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pack(settings(table), tmp_path / "whole")
    consume, calls = shards.pack.packer.Packer._consume, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        consume(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards.pack.packer.Packer, "_consume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(settings(table), tmp_path / "out")
    result = pack(settings(table), tmp_path / "out", resume=True)
    assert result.resumed > 0
    assert result.converted == whole.converted
    assert members(tmp_path / "out") == members(tmp_path / "whole")


def test_the_summary_counts_converted_pictures(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(
        pq.read_table(table).filter(pa.array([key in ("bmp", "gif", "avif", "jpeg") for key in KEYS])),
        tmp_path / "t.parquet",
    )
    assert (
        run(["shards", "pack", str(tmp_path / "t.parquet"), str(tmp_path / "out"), "--persons", "none"])
        == EXIT_DONE
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        "  stored as lossless WebP or PNG, of several frames or pages the first: 1 AVIF, 1 BMP, 1 GIF"
        in lines
    )


def test_shrinking_agrees_with_converting(table: Path, tmp_path: Path) -> None:
    result = pack(settings(table, shrink=Shrink(max_side=48)), tmp_path / "out")
    assert {rejected.reason for rejected in result.rejected} <= {"duplicate"}
    stored = members(tmp_path / "out")
    pictures = {name: data for name, data in stored.items() if not name.endswith((".json", ".txt"))}
    assert {check_picture(data).width for data in pictures.values()} == {48}
    one = tmp_path / "one.parquet"
    pq.write_table(pa.Table.from_pylist([{"key": "bmp", "image": KEYS["bmp"]}]), one)
    pack(settings(one, shrink=Shrink(max_side=48)), tmp_path / "one")
    stored = members(tmp_path / "one")
    record = parse_record(json.loads(stored["bmp.json"]))
    assert record["attributes"] == {"original_format": "BMP"}
    expected = Image.fromarray(decode_picture(KEYS["bmp"])).resize((48, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(decode_picture(stored["bmp.jpg"]), expected)
    for name, limit in (("plain", None), ("limited", 96)):
        pack(settings(table, shrink=Shrink(max_side=limit)), tmp_path / name)
    assert members(tmp_path / "limited") == members(tmp_path / "plain")


def test_tars_with_other_formats_are_indexed_as_they_are_and_converted_when_packed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/a.tar", "w") as tar:
        for key, extension in (
            ("avif", "avif"),
            ("gif", "gif"),
            ("jp2", "jp2"),
            ("pgm", "pgm"),
            ("tiff", "tif"),
        ):
            for name, content in ((f"{key}.{extension}", KEYS[key]), (f"{key}.txt", key.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    result = pack(PackSettings(str(tmp_path / "in/a.tar"), "wds", persons="none"), tmp_path / "out")
    assert result.rejected == []
    assert result.converted == {"AVIF": 1, "GIF": 1, "JPEG2000": 1, "PPM": 1, "TIFF": 1}
    manifest, rejected = index_folder(tmp_path / "in")
    assert (manifest.shards[0].samples, rejected) == (5, [])
    reader = ShardReader.from_folder(tmp_path / "in", "DIR")
    assert [reader.read(0, row).image for row in range(5)] == [
        KEYS[key] for key in ("avif", "gif", "jp2", "pgm", "tiff")
    ]
    assert run(["shards", "verify", str(tmp_path / "in")]) == EXIT_DONE


def test_a_side_too_long_for_webp_is_stored_as_png() -> None:
    for width, extension in ((MAX_WEBP_SIDE, "webp"), (MAX_WEBP_SIDE + 1, "png")):
        data = encoded("BMP", Image.linear_gradient("L").resize((width, 2)))
        stored = reencode(data)
        assert stored.extension == extension
        np.testing.assert_array_equal(decode_picture(stored.data), decode_picture(data))


def test_colour_profiles_of_rgb_pictures_stay_and_others_go() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for picture, stays in ((PHOTO, True), (PHOTO.convert("L"), True), (PHOTO.convert("RGBA"), False)):
        stored = reencode(encoded("TIFF", picture, icc_profile=profile))
        with Image.open(io.BytesIO(stored.data)) as again:
            assert (again.info.get("icc_profile") == profile) == stays
