"""The overlap of the training data with test splits, in the facts and the card of a release."""

import json
from pathlib import Path

import pytest
import torch
from handmade import config_of, write_checkpoint

from shards.overlap.pairs import ComparedSet, Pair, Sample, write_pairs
from uniemox_dist.cli.main import run as command
from uniemox_dist.models.student import Student

SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 1,
    "heads": 2,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
TRAINED_ON = "0" * 64
"""The data identity of handmade checkpoints."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = config_of(SHAPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_checkpoint(folder, Student(config.model, config.loss, 12).eval(), config, 12)
    return folder


def write_file(path: Path, identity: str, test: str = "test") -> Path:
    """Two pairs of one test sample with training samples, and a pair inside the training data."""
    sets = [ComparedSet("emo|8", test, "b" * 64, 40), ComparedSet("photos", "train", identity, 100)]
    tested = Sample(0, "t", "000000.tar", 3)
    trained = [Sample(1, key, "000000.tar", row) for row, key in enumerate("xyz")]
    pairs = [Pair(tested, trained[0], "resized", 0.98, 4.0), Pair(tested, trained[1], "mirrored", 0.97, 4.0)]
    write_pairs(path, sets, [*pairs, Pair(trained[0], trained[2], "cropped", 0.95, 9.0)])
    return path


def test_the_card_states_the_overlap_with_each_test_split(run: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "overlap.parquet", TRAINED_ON)
    assert command(["release", str(run), str(tmp_path / "out"), "--overlap", str(file)]) == 0
    row = {"name": "emo|8/test", "identity": "b" * 64, "samples": 40, "with_near_copy": 1}
    assert json.loads((tmp_path / "out/uniemox.json").read_text())["overlap"] == [row]
    card = (tmp_path / "out/README.md").read_text()
    assert "| emo\\|8/test | 40 | 1 (2.50 %) |" in card
    assert "Not measured." not in card


def test_without_a_file_the_card_says_that_it_was_not_measured(run: Path, tmp_path: Path) -> None:
    assert command(["release", str(run), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/uniemox.json").read_text())["overlap"] is None
    assert "## Overlap with test splits\nNot measured." in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("identity", "test", "says"),
    [("c" * 64, "test", "was not compared"), (TRAINED_ON, "val", "no test split was compared")],
)
def test_a_file_of_other_data_is_refused(
    run: Path, tmp_path: Path, identity: str, test: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path / "overlap.parquet", identity, test)
    assert command(["release", str(run), str(tmp_path / "out"), "--overlap", str(file)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
