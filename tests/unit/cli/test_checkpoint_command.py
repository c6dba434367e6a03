"""`uniemox checkpoint list|verify|prune` on folders with real files and hashes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from uniemox_dist.checkpoints.folders import digest, list_complete_checkpoints
from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER
from uniemox_dist.core.files import sha256_bytes, write_json
from uniemox_dist.runs.folder import RunFolder

NO_COMPLETE = "it has no complete.json, which a save writes last"
PART = 1000
"""Bytes of each of a checkpoint's two parts."""


def save(folder: RunFolder, step: int, **more: Any) -> Path:
    """A checkpoint of two parts."""
    path = folder.checkpoints / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {}
    for rank in range(2):
        data = bytes([step % 251, rank]) * (PART // 2)
        (path / f"part_{rank:05d}.safetensors").write_bytes(data)
        files[f"part_{rank:05d}.safetensors"] = {"bytes": PART, "sha256": sha256_bytes(data)}
    about = {"format": "uniemox-checkpoint", "format_version": 1, "step": step, "slots": step * 96}
    layout = {"world_size": 2, "zero_stage": 1, "precision": "bf16", "adam_step": 1.0, "files": files}
    layout |= {"config": {"run": {}, "data": {}, "batch": {}, "model": {}}, "parameters": {}}
    layout |= {"data_identity": "ab" * 32, "teacher": None, "embedding_width": None}
    info = {**about, **layout, **more}
    write_json(path / "complete.json", {**info, "sha256": digest(info)})
    os.utime(path / "complete.json", (1_795_492_800, 1_795_492_800))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Checkpoints at 100 … 500, of which retention keeps 300 and the last two; and other folders that may exist."""
    folder = RunFolder(tmp_path / "emo")
    folder.create()
    folder.config.write_text("run: {keep_last: 2, keep_every: 300}\nof_a_later_version: {x: 1}\n")
    for step in range(100, 501, 100):
        save(folder, step)
    save(folder, 50).rename(folder.checkpoints / "step_00000050.damaged")
    save(folder, 600).rename(folder.checkpoints / ".step_00000600.tmp")
    (folder.checkpoints / "step_00000700").mkdir()
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(p.name for p in folder.checkpoints.iterdir())


def flip(path: Path) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)


def test_the_list_shows_all_checkpoints_and_which_ones_retention_would_delete(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uniemox(["checkpoint", "list", str(run.path), "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["keep_last"], found["keep_every"]) == (str(run.path), 2, 300)
    assert [(c["step"], c["kept"]) for c in found["checkpoints"]] == [
        (100, False), (200, False), (300, True), (400, True), (500, True)
    ]  # fmt: skip
    assert found["checkpoints"][0] == {
        "name": "step_00000100", "step": 100, "slots": 9600, "time": 1_795_492_800, "ranks": 2, "zero_stage": 1,
        "precision": "bf16", "files": 2, "bytes": 2000, "kept": False,
    }  # fmt: skip
    # Sizes are those of what complete.json lists, of complete checkpoints and of others.
    assert found["set_aside"] == [{"name": "step_00000050.damaged", "bytes": 2000}]
    assert [c["name"] for c in found["unfinished"]] == [".step_00000600.tmp"]
    assert found["incomplete"] == [
        {"name": "step_00000700", "bytes": 0, "kind": "incomplete", "problem": NO_COMPLETE}
    ]
    assert uniemox(["checkpoint", "list", str(run.path)]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "step",
        "slots",
        "saved",
        "ranks",
        "ZeRO",
        "precision",
        "files",
        "size",
        "retention",
    ]
    assert lines[1].split()[:2] == ["100", "9,600"]
    assert lines[1].split()[4:] == ["2", "1", "bf16", "2", "2.0", "kB", "would", "delete"]
    assert lines[3].split()[-1] == "keeps"
    assert lines[6].startswith("step_00000050.damaged (")
    assert lines[6].endswith("): set aside as damaged")
    assert (
        lines[-1] == "5 complete checkpoints, 10.0 kB; retention keeps the last 2 and every multiple of 300"
    )


def test_verify_reads_every_byte_and_names_each_damaged_file(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.checkpoints / "step_00000700").rmdir()
    assert uniemox(["checkpoint", "verify", str(run.path)]) == EXIT_DONE
    out = capsys.readouterr().out.splitlines()
    assert out == [f"step_00000{step}: 2 files, 2.0 kB, sound" for step in range(100, 501, 100)]
    part = run.checkpoints / "step_00000200/part_00001.safetensors"
    flip(part)
    (run.checkpoints / "step_00000400/part_00000.safetensors").unlink()
    with open(run.checkpoints / "step_00000400/part_00001.safetensors", "ab") as file:
        file.write(b"x")
    (run.checkpoints / "step_00000300/complete.json").write_text("{")
    assert uniemox(["checkpoint", "verify", str(run.path), "--workers", "3"]) == EXIT_FAULT
    out = capsys.readouterr().out.splitlines()
    broken = run.checkpoints / "step_00000400"
    assert out == [
        "step_00000100: 2 files, 2.0 kB, sound",
        f"step_00000200: 2 files, 2.0 kB, DAMAGED: {part} was altered: its SHA-256 differs",
        f"step_00000400: 2 files, 2.0 kB, DAMAGED: {broken}/part_00000.safetensors is missing; "
        f"{broken}/part_00001.safetensors has 1001 bytes instead of 1000",
        "step_00000500: 2 files, 2.0 kB, sound",
        f"step_00000300: DAMAGED: {run.checkpoints}/step_00000300/complete.json is not a uniemox-checkpoint",
        "3 of 5 checkpoints damaged: a resumed run skips them",
    ]


def test_verify_notices_that_complete_json_was_altered(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = run.checkpoints / "step_00000400/complete.json"
    complete.write_text(complete.read_text().replace("38400", "38401"))
    assert uniemox(["checkpoint", "verify", str(run.path), "--step", "400"]) == EXIT_FAULT
    assert f"DAMAGED: {complete} was altered: its SHA-256 differs" in capsys.readouterr().out


def test_verify_accepts_one_step_or_the_folder_of_one_checkpoint(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run.checkpoints / "step_00000200/part_00001.safetensors")
    assert uniemox(["checkpoint", "verify", str(run.path), "--step", "100"]) == EXIT_DONE
    assert capsys.readouterr().out == "step_00000100: 2 files, 2.0 kB, sound\n"
    assert uniemox(["checkpoint", "verify", str(run.checkpoints / "step_00000500")]) == EXIT_DONE
    assert capsys.readouterr().out == "step_00000500: 2 files, 2.0 kB, sound\n"
    assert uniemox(["checkpoint", "verify", str(run.checkpoints / "step_00000200")]) == EXIT_FAULT
    assert uniemox(["checkpoint", "verify", str(run.path), "--step", "200"]) == EXIT_FAULT
    assert uniemox(["checkpoint", "verify", str(run.path), "--step", "150"]) == EXIT_USER
    assert capsys.readouterr().err == (
        f"uniemox: error: --step=150: {run.path} has no complete checkpoint of that step; "
        "it has 100, 200, 300, 400, 500\n"
    )


def test_prune_deletes_by_the_runs_policy_and_prints_the_freed_size(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run)
    meta = (run.checkpoints / "step_00000100/complete.json").stat().st_size
    freed = f"{3 * (2 * PART + meta) / 1000:.1f} kB"
    assert uniemox(["checkpoint", "prune", str(run.path), "--dry-run"]) == EXIT_DONE
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in out[:3]] == [
        "would delete step_00000100",
        "would delete step_00000200",
        "would delete .step_00000600.tmp",
    ]
    assert out[3] == (
        f"{freed} would be freed (2 old, 0 set aside or incomplete, 1 unfinished); 3 complete checkpoints kept"
    )
    assert names(run) == before
    assert uniemox(["checkpoint", "prune", str(run.path)]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[3].startswith(f"{freed} freed (2 old")
    assert names(run) == [
        "step_00000050.damaged",
        "step_00000300",
        "step_00000400",
        "step_00000500",
        "step_00000700",
    ]
    run.lock()  # a run may start again in this very process
    run.unlock()


def test_options_of_prune_take_the_place_of_the_runs_policy(run: RunFolder) -> None:
    options = ["--keep-last", "1", "--keep-every", "0", "--damaged"]
    assert uniemox(["checkpoint", "prune", str(run.path), *options]) == EXIT_DONE
    assert names(run) == ["step_00000500"]


def test_prune_deletes_nothing_that_the_newest_cannot_replace(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(run)
    part = run.checkpoints / "step_00000500/part_00000.safetensors"
    flip(part)
    assert uniemox(["checkpoint", "prune", str(run.path), "--damaged"]) == EXIT_FAULT
    assert capsys.readouterr().err == (
        f"uniemox: error: the newest checkpoint is damaged ({part} was altered: its SHA-256 differs); nothing was "
        f"deleted: start the run again, which skips it, or delete {part.parent} by hand\n"
    )
    assert names(run) == before


def test_prune_keeps_set_aside_checkpoints_if_there_is_no_complete_one(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in list_complete_checkpoints(run.checkpoints):
        checkpoint.folder.rename(checkpoint.folder.with_name(f"{checkpoint.folder.name}.damaged"))
    before = names(run)
    assert uniemox(["checkpoint", "prune", str(run.path), "--damaged"]) == EXIT_FAULT
    assert (
        "no complete checkpoint could replace step_00000050.damaged; nothing was deleted"
        in capsys.readouterr().err
    )
    assert names(run) == before


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_prune_refuses_a_run_that_trains(
    run: RunFolder, capsys: pytest.CaptureFixture[str], dry_run: list[str]
) -> None:
    before = names(run)
    trains = RunFolder(run.path)
    trains.lock()
    assert uniemox(["checkpoint", "prune", str(run.path), *dry_run]) == EXIT_USER
    trains.unlock()
    error = capsys.readouterr().err
    assert f"pid {os.getpid()} is training here and prunes by itself at each save" in error
    assert names(run) == before


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_folder_that_is_not_a_run_is_refused_in_one_line(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert uniemox(["checkpoint", command, str(tmp_path)]) == EXIT_USER
    assert capsys.readouterr().err.endswith(f"so it is not a run folder; did you mean {run.path}?\n")
    assert uniemox(["checkpoint", command, str(run.checkpoints)]) == EXIT_USER
    assert capsys.readouterr().err.endswith(f"give the run's folder, {run.path}\n")
    if command != "verify":
        assert uniemox(["checkpoint", command, str(run.checkpoints / "step_00000100")]) == EXIT_USER
        assert capsys.readouterr().err.endswith(f"is one checkpoint; give its run's folder, {run.path}\n")


def test_a_policy_that_is_not_a_number_is_a_user_error(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_text("run: {keep_last: many}\n")
    assert uniemox(["checkpoint", "prune", str(run.path)]) == EXIT_USER
    assert capsys.readouterr().err == (
        f"uniemox: error: {run.config}: run.keep_last='many' is not a whole number of at least 1; correct it, "
        "or give --keep-last\n"
    )
    assert (
        uniemox(["checkpoint", "prune", str(run.path), "--keep-last", "5", "--keep-every", "0"]) == EXIT_DONE
    )
    assert len(list_complete_checkpoints(run.checkpoints)) == 5


def test_a_folder_without_complete_json_is_incomplete_and_no_damage(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    left, unfinished = run.checkpoints / "step_00000700", run.checkpoints / ".step_00000600.tmp"
    assert uniemox(["checkpoint", "list", str(run.path)]) == EXIT_DONE
    assert f"step_00000700 (0 bytes): incomplete: {NO_COMPLETE}\n" in capsys.readouterr().out
    assert uniemox(["checkpoint", "verify", str(run.path)]) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[5:] == [f"step_00000700: incomplete: {NO_COMPLETE}"]
    for arguments in ([str(run.path), "--step", "700"], [str(left)]):
        assert uniemox(["checkpoint", "verify", *arguments]) == EXIT_FAULT
        assert capsys.readouterr().out == f"step_00000700: incomplete: {NO_COMPLETE}\n"
    assert uniemox(["checkpoint", "verify", str(unfinished)]) == EXIT_FAULT
    assert capsys.readouterr().out == (
        ".step_00000600.tmp: incomplete: its save, or its deletion, has not ended\n"
    )


def test_verify_reads_a_checkpoint_that_was_set_aside(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = run.checkpoints / "step_00000050.damaged"
    assert uniemox(["checkpoint", "verify", str(aside)]) == EXIT_DONE
    assert capsys.readouterr().out == "step_00000050.damaged: 2 files, 2.0 kB, sound\n"
    flip(aside / "part_00001.safetensors")
    assert uniemox(["checkpoint", "verify", str(aside)]) == EXIT_FAULT
    assert capsys.readouterr().out.splitlines()[0] == (
        f"step_00000050.damaged: 2 files, 2.0 kB, DAMAGED: {aside}/part_00001.safetensors was altered: its SHA-256 "
        "differs"
    )


def test_checkpoints_of_a_newer_version_are_neither_read_nor_deleted(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 800, format_version=2)
    assert uniemox(["checkpoint", "verify", str(run.path), "--step", "800"]) == EXIT_FAULT
    assert "step_00000800: not read: " in capsys.readouterr().out
    assert uniemox(["checkpoint", "prune", str(run.path), "--damaged"]) == EXIT_DONE
    assert names(run) == ["step_00000300", "step_00000400", "step_00000500", "step_00000800"]


def test_prune_deletes_links_but_not_their_targets(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other_disk"
    (run.checkpoints / "step_00000100").rename(other)
    (run.checkpoints / "step_00000100").symlink_to(other)
    (run.checkpoints / ".step_00000008.tmp").write_text("x" * 5)
    (run.checkpoints / ".step_00000009.tmp").symlink_to(other)
    assert uniemox(["checkpoint", "prune", str(run.path), "--damaged"]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "deleted step_00000100 (a link; its target stays)\n" in out
    assert "deleted .step_00000008.tmp (5 bytes)\n" in out
    assert names(run) == ["step_00000300", "step_00000400", "step_00000500"]
    assert len(list(other.iterdir())) == 3


def test_the_list_does_not_count_a_checkpoint_that_lacks_a_file_or_an_entry_as_complete(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = next(
        path for path in (run.checkpoints / "step_00000500").iterdir() if path.name != "complete.json"
    )
    lost.unlink()
    marker = run.checkpoints / "step_00000200" / "complete.json"
    info = {
        key: value for key, value in json.loads(marker.read_text()).items() if key not in ("slots", "sha256")
    }
    write_json(marker, {**info, "sha256": digest(info)})
    assert uniemox(["checkpoint", "list", str(run.path)]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert f"step_00000500: DAMAGED: {lost} is missing" in lines
    assert f"step_00000200: DAMAGED: {marker} lacks slots" in lines
    assert lines[-1].startswith("3 complete checkpoints, ")
    assert uniemox(["checkpoint", "list", str(run.path), "--json"]) == EXIT_DONE
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [c["step"] for c in found if "problem" in c] == [200, 500]


def test_a_damaged_checkpoint_does_not_count_among_the_last_that_are_kept(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    part = run.checkpoints / "step_00000400/part_00000.safetensors"
    flip(part)
    arguments = ["checkpoint", "prune", str(run.path), "--keep-last", "3", "--keep-every", "0"]
    assert uniemox([*arguments, "--dry-run"]) == EXIT_DONE
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"step_00000400 is damaged and does not count as kept: {part} was altered: its SHA-256 differs"
    )
    assert uniemox(arguments) == EXIT_DONE
    assert [c.step for c in list_complete_checkpoints(run.checkpoints)] == [200, 300, 400, 500]


def test_the_date_of_a_checkpoint_is_that_of_its_save_and_not_of_a_copy(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 800, time=1_700_000_000.5)
    assert uniemox(["checkpoint", "list", str(run.path), "--json"]) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["checkpoints"][-1]["time"] == 1_700_000_000.5


@pytest.mark.parametrize("command", [["checkpoint", "list"], ["checkpoint", "prune"], ["status"], ["report"]])
def test_an_empty_run_is_refused(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(run.path)
    assert uniemox([*command, ""]) == EXIT_USER
    assert capsys.readouterr().err == (
        "uniemox: error: RUN is empty; give run.dir/run.name, such as demo/runs/demo\n"
    )


def test_a_checkpoint_that_lacks_facts_is_damaged_for_verify_list_and_prune(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = save(run, 450, slots="many") / "complete.json"
    why = f"{complete} has slots=many instead of a whole number of at least 0"
    assert uniemox(["checkpoint", "verify", str(run.path)]) == EXIT_FAULT
    assert f"step_00000450: DAMAGED: {why}\n" in capsys.readouterr().out
    assert uniemox(["checkpoint", "list", str(run.path)]) == EXIT_DONE
    assert f"): damaged: {why}\n" in capsys.readouterr().out
    assert uniemox(["checkpoint", "prune", str(run.path), "--damaged"]) == EXIT_DONE
    assert names(run) == ["step_00000300", "step_00000400", "step_00000500"]
