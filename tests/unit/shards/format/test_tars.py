"""Tars as GNU tar, bsdtar, Python and `cat` make them, and as nobody should: their members and their groups."""

import io
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from shards.format.tar_headers import BadTar, Kind, read_entries
from shards.format.tars import Group, read_groups
from uniemox_dist.core.errors import UserError

FILES = {
    f"{key}.{extension}": f"{key} {extension}".encode() * 50
    for key in ("a", "b", "c")
    for extension in ("jpg", "txt")
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures and three captions, in this order in the folder's own listing or not."""
    for name, content in FILES.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    return tmp_path / "in"


def write(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shell(command: str, folder: Path) -> Path:
    """Runs a command that writes a.tar beside the folder."""
    subprocess.run(["sh", "-ec", command], cwd=folder, check=True)
    return folder.parent / "a.tar"


def contents(path: Path) -> dict[str, dict[str, bytes]]:
    """The content of each member of each group; keys are unique."""
    data = path.read_bytes()
    groups = list(read_groups(path))
    found = {
        group.name: {m.extension: data[m.offset : m.offset + m.length] for m in group.members}
        for group in groups
    }
    assert len(found) == len(groups)
    return found


EXPECTED = {key: {e: FILES[f"{key}.{e}"] for e in ("jpg", "txt")} for key in "abc"}
COMMANDS = {
    "pictures, then texts": "tar cf ../a.tar *.jpg *.txt",
    "folder": "tar cf ../a.tar .",
    "sorted folder": "tar cf ../a.tar --sort=name .",
    "reversed": "ls -r | tar cf ../a.tar -T -",
    "pax": "tar cf ../a.tar --format=pax *.jpg *.txt",
    "v7": "tar cf ../a.tar --format=v7 *.jpg *.txt",
    "volume label": "tar cf ../a.tar -V label *.jpg *.txt",
    "incremental": "tar cf ../a.tar -g ../list .",
    "joined by cat": "tar cf 1 *.jpg; tar cf 2 *.txt; cat 1 2 > ../a.tar",
    "joined by tar": "tar cf ../a.tar *.jpg; tar cf 2 *.txt; tar Af ../a.tar 2",
    "appended": "tar cf ../a.tar *.jpg; tar rf ../a.tar *.txt",
    "bsdtar": "bsdtar cf ../a.tar .",
    "bsdtar, pax": "bsdtar cf ../a.tar --format=pax *.txt *.jpg",
    "bsdtar, GNU": "bsdtar cf ../a.tar --format=gnutar *.txt *.jpg",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_members_of_a_sample_may_be_anywhere_in_a_tar(name: str, folder: Path) -> None:
    if "bsdtar" in name and shutil.which("bsdtar") is None:
        pytest.skip("bsdtar is not installed")
    assert contents(shell(COMMANDS[name], folder)) == EXPECTED


def test_samples_are_in_the_order_of_their_first_members_however_members_are_mixed(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(20):
        names = [f"{key}.{extension}" for key in range(30) for extension in ("jpg", "json", "txt")]
        draw.shuffle(names)
        tar = write(tmp_path / f"{number}.tar", [(name, name.encode()) for name in names])
        expected: dict[str, dict[str, bytes]] = {}
        for name in names:
            key, extension = name.split(".")
            expected.setdefault(key, {})[extension] = name.encode()
        found = contents(tar)
        assert found == expected
        assert list(found) == list(expected)


def test_a_tar_in_order_is_grouped_as_before(tmp_path: Path) -> None:
    members = [(f"d/{i % 7}{i}.{e}", b"x" * i) for i in range(50) for e in ("jpg", "json", "txt")]
    groups = list(read_groups(write(tmp_path / "a.tar", members)))
    assert [group.name for group in groups] == [f"d/{i % 7}{i}" for i in range(50)]
    assert [group.offset for group in groups[1:]] == [group.end for group in groups[:-1]]
    assert all(group.is_together for group in groups)


def test_a_second_member_of_one_name_begins_another_sample(tmp_path: Path) -> None:
    """As in two tars whose keys both begin at 0: nothing of the second one may join the first one's samples."""
    one = [("0.jpg", b"one"), ("0.txt", b"one")]
    two = [("0.jpg", b"two"), ("0.TXT", b"two"), ("0.txt", b"three")]
    for name, members in (("neighbours", one + two), ("apart", [*one, ("1.jpg", b""), *two])):
        tar = write(tmp_path / f"{name}.tar", members)
        data = tar.read_bytes()
        found = [
            [(m.extension, data[m.offset :][: m.length].decode()) for m in group.members]
            for group in read_groups(tar)
            if group.name == "0"
        ]
        assert found == [
            [("jpg", "one"), ("txt", "one")],
            [("jpg", "two"), ("txt", "two")],
            [("txt", "three")],
        ]


def test_the_range_of_a_scattered_sample_is_its_json_or_its_picture(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.png", b"2"), ("a.json", b"{}"), ("a.txt", b""), ("b.txt", b"")]
    tar = write(tmp_path / "a.tar", members)
    data = tar.read_bytes()
    first, second = read_groups(tar)
    assert data[first.offset : first.end].startswith(b"a.json\0")
    assert data[second.offset : second.end].startswith(b"b.png\0")
    assert (first.end - first.offset, second.end - second.offset) == (1024, 1024)


def test_a_large_tar_takes_few_bytes_for_each_member(tmp_path: Path) -> None:
    members = [(f"{i:09d}.{e}", b"") for i in range(1500) for e in ("jpg", "txt")]
    for name, some, most in (("in order", members, 120), ("apart", [*members[::2], *members[1::2]], 600)):
        tar = write(tmp_path / f"{name}.tar", some)
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_groups(tar)) == 1500
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3000 * most, f"{name}: {peak / 3000:.0f} bytes a member"


# ---- members as tarfile reads them


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(form: int, tmp_path: Path) -> None:
    long = "folder/" * 12 + "x" * 90
    names = ["a.jpg", "folder/b.jpg", f"{long}.jpg", "ü.jpg", "bytes \udcff.jpg"]
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w", format=form, pax_headers={"comment": "x"}) as out:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 511 + i
            out.addfile(info, io.BytesIO(bytes(600)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"kind {kind!r}")
            info.type, info.linkname = kind, names[1]
            out.addfile(info)
    with tarfile.open(tar) as other, open(tar, "rb") as raw:
        expected = [
            (m.name, m.offset, m.offset_data, m.size, m.linkname if m.islnk() or m.issym() else "")
            for m in other
        ]
        found = list(read_entries(raw))
    decoded = [
        (e.name.decode("utf-8", "surrogateescape").rstrip("/"), e.header, e.offset, e.length, e.link.decode())
        for e in found
    ]
    assert decoded == expected
    assert [e.kind for e in found[len(names) :]] == [
        Kind.FOLDER,
        Kind.SYMBOLIC_LINK,
        Kind.HARD_LINK,
        Kind.DEVICE,
        Kind.DEVICE,
    ]


@pytest.mark.parametrize("form", ["gnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax"])
def test_sparse_files_are_named_and_what_follows_is_read(form: str, folder: Path) -> None:
    with open(folder / "holes.jpg", "wb") as file:
        for i in range(40):
            file.seek(i << 20)
            file.write(b"x" * 4096)
    tar = shell(f"tar cf ../a.tar -S --format={form} holes.jpg *.txt", folder)
    groups = {group.name: group for group in read_groups(tar)}
    assert groups["holes"].members[0].kind is Kind.SPARSE
    assert {name: found["txt"] for name, found in contents(tar).items() if name in "abc"} == {
        key: FILES[f"{key}.txt"] for key in "abc"
    }


def test_hard_links_have_the_content_of_their_files_and_loops_end(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as out:
        info = tarfile.TarInfo("./real.jpg")
        info.size = 4
        out.addfile(info, io.BytesIO(b"real"))
        for name, target in (
            ("x.jpg", "real.jpg"),
            ("y.jpg", "./x.jpg"),
            ("z.jpg", "z.jpg"),
            ("v.jpg", "w.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            out.addfile(info)
    found = {group.name: group.members[0] for group in read_groups(tar)}
    data = tar.read_bytes()
    for name in ("real", "x", "y"):
        assert data[found[name].offset :][: found[name].length] == b"real"
    assert [found[name].kind for name in "zv"] == [Kind.HARD_LINK] * 2


# ---- tars that are none


def header(name: str, kind: bytes = b"0", size: bytes = b"00000000000\0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def long_name(count: int) -> bytes:
    return b"".join(
        header("././@LongLink", b"L", b"00000000003\0") + b"x.y".ljust(512, b"\0") for _ in range(count)
    )


def pax(text: bytes) -> bytes:
    return header("p", b"x", b"%011o\0" % len(text)) + text.ljust(-(-len(text) // 512) * 512, b"\0")


END = bytes(1024)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has no end mark"),
    "text": (b"not a tar at all" * 100, "no valid header at byte 0"),
    "negative size": (
        header("x.jpg", size=b"\xff" * 11 + b"\x00") + END,
        "'x.jpg' has a size that is negative",
    ),
    "negative octal": (header("x.jpg", size=b"-0000000512\0") + END, "'x.jpg' has a size that is negative"),
    "odd size": (header("x.jpg", size=b"zzzzzzzzzzz\0") + END, "'x.jpg' has a size that is no number"),
    "huge size": (header("x.jpg", size=b"\x80" + b"\x7f" * 11) + END, "ends inside 'x.jpg'"),
    "negative pax size": (
        pax(b"11 size=-5\n") + header("x.jpg") + END,
        "'x.jpg' has a size that is no number",
    ),
    "pax without length": (
        pax(b"path=x.jpg\n") + header("x.jpg") + END,
        "the extended header at byte 0 is damaged",
    ),
    "pax of length 0": (
        pax(b"0 path=x\n") + header("x.jpg") + END,
        "the extended header at byte 0 is damaged",
    ),
    "pax too long": (pax(b"99 path=x\n") + header("x.jpg") + END, "the extended header at byte 0 is damaged"),
    "huge header": (
        header("p", b"x", b"77777777777\0") + END,
        "the extended header at byte 0 has 8589934591 bytes",
    ),
    "cut header": (
        header("p", b"L", b"00000002000\0") + END[:600],
        "ends inside the extended header at byte 0",
    ),
    "header, no member": (long_name(2) + END, "no valid header at byte 2048"),
    "cut after header": (long_name(2), "ends after the extended header at byte 0"),
    "no end": (header("x.jpg"), "has no end mark"),
    "text after the end": (header("x.jpg") + END + b"hello" * 200, "no valid header at byte 1536"),
    "half a header": (header("x.jpg") + header("y.jpg")[:200], "ends inside the header at byte 512"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_tar_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    data, says = HOSTILE[name]
    with pytest.raises(BadTar) as caught:
        list(read_entries(io.BytesIO(data)))
    assert says in str(caught.value)
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_groups(tmp_path / "a.tar"))
    assert str(error.value).startswith(f"SOURCE={tmp_path}/a.tar: not a complete tar ({says}")
    assert len(str(error.value).splitlines()) == 1


def test_long_chains_of_extended_headers_are_read_without_recursion() -> None:
    [entry] = read_entries(io.BytesIO(long_name(5000) + header("z") + END))
    assert (entry.name, entry.header, entry.offset) == (b"x.y", 0, 5000 * 1024 + 512)


def test_many_records_in_an_extended_header_take_linear_time() -> None:
    records = b"5 a=\n"
    text = records * (1 << 17) + b"14 path=x.jpg\n"
    [entry] = read_entries(io.BytesIO(pax(text) + header("z") + END))
    assert entry.name == b"x.jpg"


def test_a_cut_anywhere_is_noticed_unless_only_zeros_are_missing(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tar", [(f"{'n' * 120}{i}.jpg", b"x" * 700) for i in range(2)]).read_bytes()
    last = len(data.rstrip(b"\0"))
    for at in range(0, len(data), 64):
        try:
            names = [entry.name for entry in read_entries(io.BytesIO(data[:at]))]
        except BadTar:
            assert at <= last + 512
        else:
            assert len(names) == 2


def test_flipped_bits_in_headers_never_crash_or_hang(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.tar", [(f"{'n' * 120}.jpg", b"x" * 10)] * 2).read_bytes()[:6144])
    draw = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(data)
        at = draw.randrange(len(data))
        damaged[at] ^= 1 << draw.randrange(8)
        block = at // 512 * 512  # with a checksum that fits, as an attacker would write it
        damaged[block + 148 : block + 156] = b" " * 8
        damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
        try:
            entries = list(read_entries(io.BytesIO(bytes(damaged))))
        except BadTar:
            continue
        assert all(0 <= e.header <= e.offset <= e.offset + e.length <= len(data) for e in entries)


def test_groups_find_members_by_extension() -> None:
    def group(*extensions: str) -> Group:
        from shards.format.tars import Member

        return Group("x", tuple(Member(e, 0, 0, 512 * i, 512 * i + 512) for i, e in enumerate(extensions)))

    assert [m.extension for m in group("seg.png", "txt", "gif", "jpg").pictures] == ["jpg", "gif", "seg.png"]
    dotted = group("txt", "v2.jpg", "v2.txt")
    found = dotted.find("txt")
    assert found is not None
    assert found.extension == "v2.txt"
    assert group("txt", "jpg").find("json") is None
