"""Every `uniemox …` line that downstream teams read in README and docs ends with exit code 0, on real pictures."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from doc_lines import command_lines
from handmade import config_of, write_checkpoint
from inputs import DEMO
from published_sets import emotion6
from told_run import told_run

from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.checkpoints.folders import open_checkpoint
from uniemox_dist.cli.main import run
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.models.classifier import Classifier, Outputs
from uniemox_dist.models.student import Student
from uniemox_dist.release.classifier import write_classifier
from uniemox_dist.release.export import release
from uniemox_dist.teacher.model import Teacher

ROOT = Path(__file__).parents[2]
SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
DOCUMENTS = (
    "README.md",
    "docs/use.md",
    "docs/evaluate.md",
    "docs/release.md",
    "docs/runs.md",
    "docs/plan.md",
    "docs/teacher_cache.md",
    "shards/README.md",
)
ELSEWHERE = {
    "uniemox shards pack EmoSet-118K": "tests/unit/shards/test_layouts_annotated.py packs that layout",
    "uniemox shards pack UnBiasedEmo": "tests/distributed/test_finetune.py packs each preset",
    "uniemox shards pack EMOTIC": "tests/distributed/test_finetune.py packs it",
    "uniemox shards pack flickr30k": "tests/unit/shards/sources/test_published_sets.py packs it",
    "uniemox shards pack s3://": "tests/unit/shards/test_remote.py packs from a bucket",
    "uniemox shards pack p": "parts: tests/unit/shards/test_merge.py",
    "uniemox evaluate protocol OUT demo/shards": "docs/evaluate.md has it with DATA, which holds the same",
    "uniemox pretrain": "tests/e2e/test_chain.py trains; these are of GPUs' size",
    "uniemox launch": "tests/cluster submits to a real Slurm",
    "uniemox doctor uniemox_vit": "tests/distributed/test_doctor.py runs it on ranks",
    "uniemox finetune": "tests/distributed/test_finetune.py runs it on ranks, each recipe in its own layout",
    "uniemox status runs --watch": "--watch has no end; tests/unit/cli/test_status_command.py",
    "uniemox status runs/vit_* --watch": "--watch has no end; tests/unit/cli/test_status_command.py",
}
"""Beginnings of lines that are run by other tests, or cannot be here, and why."""
LEFT_OUT = {"data.path=…": "data.path=DATA/train", "teacher.name=…": "teacher.name=local-dir:models/clip"}
"""What the reader has to fill in."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, photo_folder: Path) -> Path:
    """A folder in which all that the documents name exists: RUN, OUT, DATA, CLASSIFIER, photos/, photo.jpg, …"""
    world = tmp_path_factory.mktemp("world")
    table = pq.read_table(DEMO)
    some = table.take([*range(0, 1251, 18), *range(1251, 1599, 12)])
    pq.write_table(some, world / "some.parquet")
    pack(PackSettings(str(world / "some.parquet"), persons="none", shard_samples=32), world / "DATA")
    for name in ("demo/shards", "data/emoset", "data/emo8"):
        shutil.copytree(world / "DATA", world / name)
    pack(PackSettings(str(photo_folder), "folder", persons="none"), world / "data/photos/train")
    pack(PackSettings(str(photo_folder), "folder", persons="none", shard_samples=7), world / "data/fi")
    emotion6(world / "Emotion6")
    source, out = str(world / "Emotion6"), str(world / "data/emotion6")
    assert run(["shards", "pack", source, out, "--preset", "emotion6", "--persons", "none"]) == 0
    shutil.copytree(photo_folder, world / "photos")
    shutil.copy(photo_folder / "people/astronaut-0.jpg", world / "photo.jpg")
    shutil.copytree(tiny_teacher, world / "models/clip")
    plain = config_of({**SHAPE, **DECODER}).model_dump(mode="json")
    plain["data"]["path"] = str(world / "DATA/train")
    config = Config.model_validate({**plain, "teacher": {"name": f"local-dir:{tiny_teacher}"}})
    teacher = Teacher(config.teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config.model, config.loss, teacher.width)
    for name in ("runs/vit_b16", "runs/earlier"):
        told_run(world / name)
    for name in ("RUN", "demo/runs/demo", "runs/vit_b16"):
        for step in (1000, 2000):
            write_checkpoint(
                world / name, student, config, teacher.width, teacher=teacher.identity, step=step
            )
    release(world / "RUN", world / "OUT")
    fine = FinetuneRun.model_validate(
        {
            "run": {"max_steps": 10},
            "data": {"path": "nowhere"},
            "model": SHAPE,
            "finetune": {"mixup": 0, "cutmix": 0},
        }
    )
    outputs = Outputs("single", ("awe", "fear"))
    classifier = Classifier(fine.model, outputs).eval()
    write_checkpoint(world / "finetuned", classifier, fine, None)  # type: ignore[arg-type]
    write_classifier(world / "CLASSIFIER", open_checkpoint(world / "finetuned", "RUN"), fine, outputs, {})
    return world


def lines_of(document: str) -> list[list[str]]:
    """Its commands; of a synopsis what is not optional."""
    found = []
    for words in command_lines((ROOT / document).read_text(encoding="utf-8")):
        ends = (i for i, word in enumerate(words) if word == ">" or word.startswith("["))
        found.append([LEFT_OUT.get(word, word) for word in words[: next(ends, None)]])
    return found


def reason_of(words: list[str]) -> str | None:
    line = " ".join(["uniemox", *words])
    if "--dry-run" in words:
        return None
    return next((reason for start, reason in ELSEWHERE.items() if line.startswith(start)), None)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_lines_of_a_document_run(
    document: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    done = 0
    for words in lines_of(document):
        if reason_of(words) is not None:
            continue
        writes = {"release": "OUT", "embed": "vectors.parquet", "shards": "data/photos"}
        made = Path(writes.get(words[0], "nothing"))
        if (words[0] == "release" and not {"--inspect", "--verify"} & set(words)) or words[:2] == [
            "shards",
            "pack",
        ]:
            shutil.rmtree(made, ignore_errors=True)
        elif words[0] == "embed":
            made.unlink(missing_ok=True)
        code = run(words)
        assert code == 0, f"uniemox {' '.join(words)}: exit code {code}\n{capsys.readouterr().err}"
        done += 1
    assert done


def test_lines_tested_elsewhere_still_occur_in_the_docs() -> None:
    lines = [" ".join(["uniemox", *words]) for document in DOCUMENTS for words in lines_of(document)]
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)] == []
