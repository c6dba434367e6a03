"""Going on with what is damaged: a journal, a plan, shards and indexes of an interrupted pack."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import shards.pack.packer
from shards.pack.journal import Journal
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_FAULT, UserError

SHARDS = 3  # whole ones that the interrupted pack left


class Stopping(shards.pack.packer.ShardWriter):
    """Ends with an error when `after` shards are whole."""

    after = SHARDS

    def add_encoded(self, sample: shards.pack.packer.Encoded) -> None:
        if len(self.entries) == self.after:
            raise RuntimeError("stop")
        super().add_encoded(sample)


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def stopped(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, and with `out.partial` of a pack that was stopped behind its third shard."""
    root = tmp_path_factory.mktemp("stopped")
    pack(of(photo_folder), root / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.pack.packer, "ShardWriter", Stopping)
        with pytest.raises(RuntimeError):
            pack(of(photo_folder), root / "out")
    return root


def of(source: Path) -> PackSettings:
    return PackSettings(str(source), "folder", persons="none", shard_samples=4)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def flip(data: bytes) -> bytes:
    """Another byte in the middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def second_line(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        lines = data.split(b"\n")
        return b"\n".join([lines[0], change(lines[1]), *lines[2:]])

    return changed


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda p: None, 3),
    "garbage line": (lambda p: edit(p / ".work/journal.jsonl", second_line(lambda _: b"\xff{]")), 1),
    "zeroed line": (lambda p: edit(p / ".work/journal.jsonl", second_line(lambda line: bytes(len(line)))), 1),
    "flipped bit": (lambda p: edit(p / ".work/journal.jsonl", second_line(flip)), 1),
    "empty line": (lambda p: edit(p / ".work/journal.jsonl", second_line(lambda _: b"")), 1),
    "half a last line": (lambda p: edit(p / ".work/journal.jsonl", lambda data: data[:-20]), 2),
    "only garbage": (lambda p: edit(p / ".work/journal.jsonl", lambda _: b"\0" * 5000), 0),
    "missing index": (lambda p: (p / "index/000001.parquet").unlink(), 1),
    "cut index": (lambda p: edit(p / "index/000001.parquet", lambda data: data[:-9]), 1),
    "other index": (lambda p: edit(p / "index/000001.parquet", flip), 1),
    "missing tar": (lambda p: (p / "000002.tar").unlink(), 2),
    "other tar": (lambda p: edit(p / "000000.tar", flip), 0),
    "index that is a folder": (
        lambda p: [(p / "index/000002.parquet").unlink(), (p / "index/000002.parquet").mkdir()],
        2,
    ),
    "strange things": (
        lambda p: [
            (p / "stray/inner").mkdir(parents=True),
            (p / "x").mkdir(),
            (p / "x/y").write_text("z"),
            (p / "link").symlink_to("x"),
        ],
        3,
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_and_all_later_ones_are_packed_again(
    case: str, stopped: Path, photo_folder: Path, tmp_path: Path
) -> None:
    damage, kept = DAMAGE[case]
    shutil.copytree(stopped / "out.partial", tmp_path / "out.partial")
    damage(tmp_path / "out.partial")
    result = pack(of(photo_folder), tmp_path / "out", resume=True)
    assert result.resumed == 4 * kept
    assert files(tmp_path / "out") == files(stopped / "whole")
    folders = [path.name for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert folders == ["index"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b'{"settings": 3}', b"\xff\xff"])
def test_without_its_plan_an_interrupted_pack_is_refused_in_one_line(
    content: bytes | None, stopped: Path, photo_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped / "out.partial", tmp_path / "out.partial")
    plan = tmp_path / "out.partial/.work/plan.json"
    plan.unlink() if content is None else plan.write_bytes(content)
    before = files(tmp_path)
    with pytest.raises(UserError) as caught:
        pack(of(photo_folder), tmp_path / "out", resume=True)
    partial = tmp_path / "out.partial"
    assert str(caught.value) == (
        f"OUT={partial}: an interrupted pack cannot resume: its .work/plan.json is missing or damaged; delete "
        f"{partial} and pack again"
    )
    assert {name: sha for name, sha in files(tmp_path).items() if "records" not in name} == {
        name: sha for name, sha in before.items() if "records" not in name
    }


def test_differences_besides_the_settings_are_named(tmp_path: Path) -> None:
    plan = {"settings": {"seed": 0}, "part": None, "captions": {"a": 1}, "detector": {}, "source_sha256": "x"}
    Journal(tmp_path, plan).path.write_text("steps")
    for change, says in (
        ({"captions": {"a": 2}}, "its captions have changed"),
        ({"captions": None, "detector": {"name": "x"}}, "its captions and detector have changed"),
        ({"source_sha256": "y"}, "its source has changed"),
        ({"part": (1, 2)}, "other settings: part=1/2 was none"),
        ({"settings": {"seed": 1}, "source_sha256": "y"}, "other settings: seed=1 was 0"),
    ):
        with pytest.raises(UserError, match=f"cannot resume: {says}; use its original settings"):
            Journal(tmp_path, {**plan, **change})
    Journal(tmp_path, plan)


def test_a_pack_killed_before_its_first_shard_does_not_block_another(
    photo_folder: Path, tmp_path: Path
) -> None:
    """A real kill leaves what no cleaning up follows: the working folder with an empty journal and a plan."""
    work = tmp_path / "out.partial/.work"
    work.mkdir(parents=True)
    Journal(work, {"settings": {"seed": 7}, "part": None, "source_sha256": "other"})
    (work / "records.jsonl").write_text("old")
    for resume in (False, True):
        out = tmp_path / "out"
        assert sum(pack(of(photo_folder), out, resume=resume).packed.values()) == 20
        assert not (tmp_path / "out.partial").exists()


def test_a_worker_that_dies_is_a_one_line_fault(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shards.pack.packer.Workers, "__init__", _with_deadly_workers)
    command = ["shards", "pack", str(photo_folder), str(tmp_path / "out"), "--layout", "folder"]
    assert run([*command, "--persons", "none", "--workers", "1"]) == EXIT_FAULT
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("packing:")] == [
        "uniemox: error: a packing worker died (killed, or out of memory); continue with --resume and fewer --workers"
    ]


def _with_deadly_workers(self: shards.pack.packer.Workers, count: int) -> None:
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    self.count, self._slots = count, []
    context = multiprocessing.get_context("spawn")
    self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=os._exit, initargs=(9,))
