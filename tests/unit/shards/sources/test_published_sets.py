"""Published sets, packed by the commands of shards/sources/README.md: what is in the tars, by the rules of public
readers, written down by hand."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from published_sets import SETS, command_of, pack_commands, samples

from uniemox_dist.cli.main import run


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Writes a miniature, runs the command of the document for it, and returns its samples and the printed summary."""

    def packed(source: str) -> tuple[dict[str, dict[str, Any]], str]:
        monkeypatch.chdir(tmp_path)
        SETS[source](tmp_path / source)
        words = command_of(source)
        code = run(words)
        out, err = capsys.readouterr()
        assert code == 0, err
        return samples(tmp_path / words[3]), out

    return packed


def counts(found: dict[str, dict[str, Any]], *fields: str) -> Counter[Any]:
    return Counter(tuple(sample[field] for field in fields) for sample in found.values())


def test_every_set_of_the_document_has_a_miniature() -> None:
    assert sorted(words[2] for words in pack_commands()) == sorted(SETS)


# ---- the seven


def test_unbiased_emo_has_labels_above_its_search_engines(pack: Any) -> None:
    found, out = pack("UnBiasedEmo")
    assert "found in UnBiasedEmo/images: 120 pictures, 6 labels, 3 splits" in out
    assert found["joy/bing/3.jpg"]["label"] == "joy"
    labels = ("anger", "fear", "joy", "love", "sadness", "surprise")
    shares = {"train": 14, "val": 2, "test": 4}
    assert counts(found, "label", "split") == {
        (label, split): count for label in labels for split, count in shares.items()
    }


def test_heco_has_persons_with_boxes_labels_and_vad(pack: Any) -> None:
    found, out = pack("HECO")
    assert "found: 3 pictures, 2 labels, 1 split, 5 persons with 4 labels and VAD" in out
    assert "refused HECO_0004.png: annotation: persons.0.valence: 11 is beyond 1 to 10" in out
    first, second, third = (found[f"HECO_000{i}.png"] for i in (1, 2, 3))
    assert first["persons"] == [
        # pixels of 48 x 32; the larger one first
        {
            "box": [0.25, 0.25, 1.0, 1.0],
            "score": 1.0,
            "labels": {
                "label": "Happiness", "valence": 8.0, "arousal": 6.0, "dominance": 5.0,
                "Label_SA": "Neutral", "Label_CA": "Highly-Ca",
            },
        },
        {
            "box": [0.0, 0.0, 0.25, 0.5],
            "score": 1.0,
            "labels": {
                "label": "Peace", "valence": 6.0, "arousal": 3.0, "dominance": 5.0,
                "Label_SA": "Extremely-Sa", "Label_CA": "Mildly-Ca",
            },
        },
    ]  # fmt: skip
    assert first["label"] == ""  # its persons differ
    [clipped] = second["persons"]
    assert (clipped["box"], second["label"]) == ([0.125, 0.25, 1.0, 1.0], "Anger")
    assert third["label"] == "Fear"
    assert [person["labels"]["valence"] for person in third["persons"]] == [3.0, 2.0]
    assert third["attributes"] == {}


def test_caer_s_takes_angry_for_anger(pack: Any) -> None:
    found, out = pack("CAER-S")
    assert "found: 35 pictures, 7 labels, 3 splits" in out
    assert found["train/Angry/0001.png"]["label"] == "Anger"
    shares = {"train": 2, "test": 2, "val": 1}
    labels = ("Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")
    assert counts(found, "label", "split") == {(label, s): n for label in labels for s, n in shares.items()}


def test_emotion6_has_labels_of_folders_and_distributions_and_vad_of_ground_truth(pack: Any) -> None:
    found, out = pack("Emotion6")
    assert (
        "found in Emotion6/images: 60 pictures, 6 labels, 60 distributions, valence and arousal, 3 splits"
        in out
    )
    joy = found["joy/3.jpg"]
    assert (joy["label"], joy["attributes"]) == ("joy", {"valence": 4.5, "arousal": 4.2})
    assert joy["label_distribution"] == {
        "anger": 0.333333, "disgust": 0, "fear": 0, "joy": 0.4, "sadness": 0, "surprise": 0, "neutral": 0.266667,
    }  # fmt: skip
    assert counts(found, "split") == {("train",): 42, ("val",): 6, ("test",): 12}
