"""Emotions of pictures: by texts of labels, with a teacher and without, and by a fine-tuned head."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import config_of, write_checkpoint
from PIL import Image
from safetensors.torch import save_file
from small import DECODER, SHAPE, make_taught_release

from uniemox_dist import load_uniemox
from uniemox_dist.checkpoints.folders import open_checkpoint
from uniemox_dist.cli.main import run
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.inference.predict import load_texts
from uniemox_dist.models.classifier import Classifier, Outputs
from uniemox_dist.release.classifier import write_classifier
from uniemox_dist.release.load import to_pixels
from uniemox_dist.teacher.model import Teacher

LABELS = ("awe", "fear", "joy")


@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A release in the space of `tiny_teacher`."""
    return make_taught_release(tmp_path_factory.mktemp("taught"), tiny_teacher)


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["predict", *arguments]) == 0
    return capsys.readouterr().out


def test_texts_of_labels_tell_pictures_apart_with_and_without_the_teacher(
    with_teacher: Path,
    tiny_teacher: Path,
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts.safetensors"
    given = ["--labels", ",".join(LABELS), "--template", "feel {}", "--save-texts", str(texts)]
    lines = [
        json.loads(x) for x in predicted(capsys, str(with_teacher), str(picture_folder), *given).splitlines()
    ]
    assert [line["picture"] for line in lines] == sorted(p.name for p in picture_folder.iterdir())
    assert [line["picture"] for line in lines if "error" in line] == ["05.webp", "06.jpg"]
    teacher = Teacher(config_of({**SHAPE}).teacher.model_copy(update={"name": f"local-dir:{tiny_teacher}"}))
    expected_CE = teacher.embed_texts([f"feel {label}" for label in LABELS]).numpy()
    found = load_texts(texts)
    assert found.labels == LABELS
    np.testing.assert_allclose(found.vectors_CE, expected_CE, atol=1e-6)
    gamma = load_uniemox(with_teacher).embed(Image.open(picture_folder / "00.jpg")).numpy()
    logits = torch.from_numpy(teacher.logit_scale * gamma @ expected_CE.T)
    expected = dict(zip(LABELS, logits.softmax(1)[0].tolist()))
    assert lines[0]["probabilities"] == pytest.approx(expected, abs=1e-4)
    assert lines[0]["label"] == max(expected, key=lambda label: expected[label])
    rows = list(
        csv.DictReader(
            io.StringIO(
                predicted(
                    capsys, str(with_teacher), str(picture_folder), "--texts", str(texts), "--format", "csv"
                )
            )
        )
    )
    assert [row["picture"] for row in rows] == [line["picture"] for line in lines]
    assert float(rows[0]["joy"]) == lines[0]["probabilities"]["joy"]
    assert rows[5]["error"].startswith("cannot be decoded")


@pytest.mark.parametrize("task", ["single", "multi", "distribution"])
def test_a_fine_tuned_head_answers_by_its_own_labels(
    picture_folder: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dimensions = {"single": (), "multi": ("valence", "arousal", "dominance"), "distribution": ("valence",)}[
        task
    ]
    ranges = ((-2.0, 6.0),) if task == "distribution" else ()
    target = "distribution" if task == "distribution" else "label"
    task = "single" if task == "distribution" else task
    given = {
        "run": {"max_steps": 10},
        "data": {"path": "nowhere"},
        "model": {**SHAPE, **DECODER},
        "finetune": {"task": task, "target": target, "mixup": 0, "cutmix": 0},
    }
    config = FinetuneRun.model_validate(given)
    outputs = Outputs(task, LABELS, dimensions, target=target, ranges=ranges)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        classifier = Classifier(config.model, outputs).eval()
        torch.nn.init.normal_(classifier.head.weight)
    write_checkpoint(tmp_path / "run", classifier, config, None)
    best = tmp_path / "best"
    write_classifier(best, open_checkpoint(tmp_path / "run", "RUN"), config, outputs, {})
    line = json.loads(predicted(capsys, str(best), str(picture_folder / "03.jpg")))
    pixels = to_pixels(Image.open(picture_folder / "03.jpg"))[None]
    pixels = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        answers = classifier(pixels, None)[0][0]
    logits = answers[:3]
    expected = logits.sigmoid() if task == "multi" else logits.softmax(0)
    assert line["probabilities"] == pytest.approx(dict(zip(LABELS, expected.tolist())), abs=1e-4)
    if dimensions:
        values = dict(zip(dimensions, outputs.from_unit(answers[3:]).tolist()))
        assert line["dimensions"] == pytest.approx(values, abs=1e-3)
    table = predicted(capsys, str(best), str(picture_folder), "--format", "csv").splitlines()
    assert table[0] == ",".join(["picture", "label", *LABELS, *dimensions, "error"])
    assert len(table) == 24
    assert run(["predict", str(best), str(picture_folder), "--labels", "a,b"]) == 2
    capsys.readouterr()
    for command in (
        ["release", str(best), "--inspect"],
        ["evaluate", "gallery", str(best), "x", "--out", "x.json"],
    ):
        assert run(command) == 2
        err = capsys.readouterr().err
        assert (
            f"={best}: is a fine-tuned classifier, not a release; `uniemox predict {best} INPUT` reads it"
            in err
        )
    weights = bytearray((best / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (best / "model.safetensors").write_bytes(weights)
    assert run(["predict", str(best), str(picture_folder)]) == 2
    assert "model.safetensors was altered" in capsys.readouterr().err


def test_user_errors_are_one_line(
    with_teacher: Path,
    small_release: Path,
    picture_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.safetensors"
    metadata = {
        "format": "uniemox-texts",
        "labels": '["a", "b"]',
        "logit_scale": "1.0",
        "teacher_sha256": "0",
    }
    save_file({"texts": torch.eye(2, 32)}, other, metadata=metadata)
    save_file({"texts": torch.eye(2)}, tmp_path / "weights.safetensors")
    release_and_input = [str(with_teacher), str(picture_folder)]
    for arguments, says in (
        (release_and_input, "is not a classifier; give --labels"),
        ([*release_and_input, "--labels", "awe"], "--labels: names one class only (awe); give at least two"),
        ([*release_and_input, "--labels", "awe,fear,awe"], "--labels: names awe twice"),
        ([*release_and_input, "--labels", "awe,fear", "--template", "x"], "--template='x': has no {}"),
        ([*release_and_input, "--texts", str(other)], "are of another teacher"),
        (
            [*release_and_input, "--texts", str(tmp_path / "weights.safetensors")],
            "is not a file of label texts",
        ),
        ([*release_and_input, "--texts", str(tmp_path / "none")], "no such file"),
        ([str(small_release), str(picture_folder), "--labels", "a,b"], "was trained without a teacher"),
        (
            [str(with_teacher), str(other), "--labels", "a,b"],
            "other.safetensors: its only picture cannot be read (",
        ),
    ):
        assert run(["predict", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
