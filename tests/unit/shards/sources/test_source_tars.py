"""Which tars a source names: folders at any depth, braces, `::`, compression, and the indexes of our own data sets."""

import shutil
import subprocess
from pathlib import Path

import pytest
from tars import jpeg, records, write_tar

from shards.edit.index_tars import index_folder
from shards.edit.select import select, split
from shards.format.manifest import read_manifest
from shards.pack.pipeline import PackSettings, pack
from shards.sources.tars import find_tars
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError


def names(source: object) -> list[tuple[str, str | None]]:
    return [(tar.name, tar.split) for tar in find_tars(str(source))[0]]


def make(folder: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        write_tar(folder / path, {f"{number}.jpg": jpeg(number), f"{number}.txt": b"caption"})
    return folder


# ---- names


def test_braces_and_lists_stand_for_tars_as_in_webdataset(tmp_path: Path) -> None:
    make(tmp_path, *(f"s/{i:06d}.tar" for i in range(12)), "t/x.tar", "t/y.tar")
    some = f"{tmp_path}/s/{{000009..000011}}.tar"
    assert names(some) == [(f"{i:06d}.tar", None) for i in (9, 10, 11)]
    assert names(f"{tmp_path}/s/{{000000..000011..5}}.tar") == [(f"{i:06d}.tar", None) for i in (0, 5, 10)]
    assert names(f"{tmp_path}/{{s/000001,t/x,t/y}}.tar") == [
        ("s/000001.tar", None),
        ("t/x.tar", None),
        ("t/y.tar", None),
    ]
    assert names(f"{some}::{tmp_path}/t::{tmp_path}/s/00000[01].tar") == [
        *((f"s/{i:06d}.tar", None) for i in (9, 10, 11)),
        ("t/x.tar", None),
        ("t/y.tar", None),
        ("s/000000.tar", None),
        ("s/000001.tar", None),
    ]


def test_a_file_whose_name_has_braces_is_itself(tmp_path: Path) -> None:
    make(tmp_path, "{a,b}.tar")
    assert names(tmp_path / "{a,b}.tar") == [("{a,b}.tar", None)]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{dir}/{{00..02}}.tar", "{dir}/02.tar: no such file or folder"),
        ("{dir}/00.tar::", "has an empty name beside ::"),
        ("{dir}/00.tar::{dir}/00.tar", "{dir}/00.tar is listed twice"),
        ("{dir}/{{0..99999999}}.tar", "stands for more than 1,000,000 names"),
        ("{dir}/{{0..999}}{{0..999}}{{0..9}}.tar", "stands for more than 1,000,000 names"),
        ("pipe:cat {dir}/00.tar", "pipe: runs a shell command"),
        ("{dir}/00.tar::pipe:curl https://x/y.tar", "pipe: runs a shell command"),
    ],
)
def test_names_that_cannot_be_tars_are_one_line(
    source: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "00.tar", "01.tar")
    given = source.format(dir=tmp_path)
    assert run(["shards", "pack", given, str(tmp_path / "out"), "--layout", "wds"]) == EXIT_USER
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"uniemox: error: SOURCE={given}: ")
    assert says.format(dir=tmp_path) in line
    assert not (tmp_path / "out").exists()


# ---- folders


def test_tars_are_found_at_any_depth(tmp_path: Path) -> None:
    make(tmp_path, "a.tar", "more/b.tar", "more/still/c.TAR", ".hidden/d.tar", "__MACOSX/e.tar")
    assert names(tmp_path) == [("a.tar", None), ("more/b.tar", None), ("more/still/c.TAR", None)]
    (tmp_path / "a.tar").unlink()
    assert names(tmp_path) == [("more/b.tar", "more"), ("more/still/c.TAR", "more")]
    make(tmp_path, "Train/x.tar", "Train/part/y.tar")
    assert names(tmp_path)[:2] == [("Train/part/y.tar", "train"), ("Train/x.tar", "train")]


def test_linked_folders_are_read_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path / "disk", "a.tar")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "disk")
    assert names(tmp_path / "in") == [("train/a.tar", "train")]


def test_tars_beside_folders_of_splits_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.tar", "Test/b.tar")
    with pytest.raises(UserError, match=r"has tars beside folders of splits \(Test\); move them"):
        find_tars(str(tmp_path))


def test_pictures_and_archives_beside_tars_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.tar", "more/b.tar")
    (tmp_path / "more/loose.JPG").write_bytes(jpeg(5))
    (tmp_path / "c.zip").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "photo").write_bytes(jpeg(6))
    (tmp_path / "drawing.psd").write_bytes(b"8BPS\0\1" + bytes(20))
    (tmp_path / "a.tar.1").write_bytes((tmp_path / "a.tar").read_bytes())
    make(tmp_path, ".hidden/h.tar")
    result = pack(PackSettings(str(tmp_path), "wds", persons="none"), tmp_path / "out")
    assert result.packed == {"": 2}
    assert {refused.source: refused.reason for refused in result.rejected} == {
        "more/loose.JPG": "unreadable",
        "c.zip": "format",
        "photo": "unreadable",
        "drawing.psd": "unreadable",
        "a.tar.1": "format",
        ".hidden/h.tar": "unreadable",
    }


def test_index_names_what_it_does_not_index(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, "a.tar", "more/b.tar")
    assert run(["shards", "index", str(tmp_path)]) == EXIT_DONE
    line = f"tars in folders of {tmp_path} are not indexed; index them one by one: more"
    assert line in capfd.readouterr().out
    make(tmp_path, "other/a.tar", "other/b.tar.gz")
    assert run(["shards", "index", str(tmp_path / "other")]) == EXIT_USER
    assert "b.tar.gz: only files called .tar can be indexed; decompress it" in capfd.readouterr().err


# ---- compression

TOOLS = {
    "a.tar.gz": "gzip",
    "b.tgz": "gzip",
    "c.tar.bz2": "bzip2",
    "d.tar.xz": "xz",
    "e.tar.zst": "zstd",
    "f.tar": "gzip",
}


@pytest.mark.parametrize("name", TOOLS)
def test_compressed_tars_are_packed(name: str, tmp_path: Path) -> None:
    tool = TOOLS[name]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    plain = write_tar(
        tmp_path / "plain", {"x.jpg": jpeg(1), "y.jpg": jpeg(2), "x.txt": b"one", "y.txt": b"two"}
    )
    (tmp_path / "in").mkdir()
    compressed = subprocess.run([tool, "-c", plain], capture_output=True, check=True).stdout
    (tmp_path / "in" / name).write_bytes(compressed)
    for given, out in ((tmp_path / "in", "out"), (tmp_path / "in" / name, "again")):
        result = pack(PackSettings(str(given), "wds", persons="none"), tmp_path / out)
        assert (result.packed, result.rejected) == ({"": 2}, [])
    same = [(tmp_path / out / "000000.tar").read_bytes() for out in ("out", "again")]
    assert same[0] == same[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.tar",
        "index",
        "manifest.json",
        "rejected.parquet",
        "sizes.json",
    ]
    # Half of it is refused by name.
    (tmp_path / "in" / name).write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(UserError, match=rf"SOURCE=.*/{name}: not a complete compressed tar"):
        pack(PackSettings(str(tmp_path / "in"), "wds", persons="none"), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_compression_that_is_not_read_is_refused_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x04\x22\x4d\x18" + bytes(100))
    with pytest.raises(UserError, match=r"a\.tar: not a tar that can be read; convert it first \(lz4 -d\)"):
        records(tmp_path / "a.tar")
    (tmp_path / "b.zip").write_bytes(b"PK\3\4")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"has no tars; .*; b\.zip is an archive that is no tar"):
        records(tmp_path)


@pytest.mark.parametrize("command", ["pack", "index"])
def test_a_tar_that_was_cut_inside_a_member_is_named_with_exit_code_2(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", "a.tar", "b.tar")
    data = (tmp_path / "in/b.tar").read_bytes()
    (tmp_path / "in/b.tar").write_bytes(data[: 512 + len(jpeg(1)) // 2])
    more = [str(tmp_path / "out"), "--layout", "wds"] if command == "pack" else []
    assert run(["shards", command, str(tmp_path / "in"), *more, "--workers", "0"]) == EXIT_USER
    line = capfd.readouterr().err.splitlines()[-1]
    assert (
        f"{tmp_path}/in/b.tar: not a complete tar (ends inside '1.jpg'); copy it again or remove it" in line
    )
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a.tar", "b.tar"]


# ---- --picture


def test_the_picture_of_a_key_with_several_can_be_chosen(tmp_path: Path) -> None:
    members = {
        "k.left.jpg": jpeg(1),
        "k.right.jpg": jpeg(2),
        "k.txt": b"both",
        "k.right.txt": b"right",
        "m.left.jpg": jpeg(3),
    }
    write_tar(tmp_path / "a.tar", members)
    for name in ("right", ".Right", "right.jpg"):
        out = tmp_path / f"out {name}"
        arguments = [
            "shards",
            "pack",
            str(tmp_path / "a.tar"),
            str(out),
            "--layout",
            "wds",
            "--picture",
            name,
        ]
        assert run([*arguments, "--persons", "none", "--workers", "0"]) == EXIT_DONE
        manifest = read_manifest(out)
        assert (manifest.samples, manifest.provenance["records"]) == (1, 3)
        assert manifest.provenance["rejected"] == {"duplicate_key": 1, "no_picture": 1}
        assert manifest.provenance["settings"]["picture"].startswith("right")
    result = pack(
        PackSettings(str(tmp_path / "a.tar"), "wds", persons="none", picture="right"), tmp_path / "x"
    )
    assert {(r.source, r.detail) for r in result.rejected} == {
        ("a.tar/k.left.jpg", "a second picture (.left.jpg) of one key"),
        ("a.tar/m", "has no picture right, but .left.jpg"),
    }


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--picture", "left", "--layout", "folder"], "--picture=left: --layout folder has one picture"),
        (["--picture", "", "--layout", "wds"], "--picture=: is empty"),
        (
            ["--picture", "up", "--layout", "wds"],
            "nothing to pack, all 1 records were refused; the first: a.tar/0: has no picture up, but .jpg",
        ),
    ],
)
def test_a_picture_that_no_sample_has_is_one_line(
    more: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "in", "a.tar")
    arguments = ["shards", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0"]
    assert run([*arguments, "--persons", "none", *more]) == EXIT_USER
    assert says in capfd.readouterr().err.splitlines()[-1]


# ---- data sets of ours


def keys(folder: Path) -> set[str]:
    from shards.format.index import index_path, read_index

    return {
        key
        for entry in read_manifest(folder).shards
        for key in read_index(index_path(folder, entry.name), ["key"])["key"].to_pylist()
    }


def test_packing_a_linked_split_reads_the_samples_of_its_index(photo_shards: Path, tmp_path: Path) -> None:
    split(photo_shards, tmp_path / "splits", {"train": 60, "test": 40}, link=True)
    result = pack(PackSettings(str(tmp_path / "splits"), "wds", persons="none"), tmp_path / "out")
    assert (result.packed, result.rejected) == ({"train": 12, "test": 8}, [])
    for name in ("train", "test"):
        assert keys(tmp_path / "out" / name) == keys(tmp_path / "splits" / name)
    tar = tmp_path / "splits/train/000000.tar"
    chosen = read_manifest(tmp_path / "splits/train").shards[0].samples
    for source in (tar, f"{tar.parent}/00000[0].tar", f"{tar.parent}/{{000000..000000}}.tar"):
        assert len(records(source)) == chosen


def test_packing_an_indexed_folder_reads_the_samples_of_its_index(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "in/a.tar", {"a.jpg": jpeg(1), "bad.jpg": b"x", "b.left.jpg": jpeg(2), "b.up.jpg": jpeg(3)}
    )
    index_folder(tmp_path / "in")
    assert [record.name for record in records(tmp_path / "in")] == ["a.tar/a", "a.tar/b"]
    select(tmp_path / "in", tmp_path / "some", filter_text="width == 64", link=True)
    assert len(records(tmp_path / "some")) == 2


def test_a_tar_that_the_manifest_beside_it_does_not_list_is_refused(
    photo_shards: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(photo_shards, tmp_path / "in")
    make(folder, "x.tar")
    for source in (folder, folder / "x.tar"):
        with pytest.raises(UserError, match=r"x\.tar is not in the manifest\.json beside it; move it away"):
            records(source)


def test_quarantined_tars_and_changed_tars_are_not_read(photo_shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(photo_shards, tmp_path / "in")
    (folder / "quarantine").mkdir()
    shutil.copy(folder / "000000.tar", folder / "quarantine")
    assert len(records(folder)) == 20
    with open(folder / "000000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"000000\.tar has \d+ bytes instead of"):
        records(folder)


def test_the_manifest_of_another_program_is_ignored(tmp_path: Path) -> None:
    make(tmp_path, "a.tar")
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert len(records(tmp_path)) == 1
