"""Published sets of faces and ArtEmis, packed by the commands of shards/sources/README.md: labels, distributions,
splits, values and pixels by the rules of public readers, written down by hand."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import face_sets as sets
import numpy as np
import pytest
from PIL import Image
from published_sets import jpegs, samples, table

from shards.pack.opening import open_settings
from shards.pack.settings import PackSettings
from shards.sources import open_source
from uniemox_dist.cli.main import run

LABELS = ("angry", "happy", "sad", "surprise", "neutral")
SPLITS = ("train", "train", "val", "val", "test")


def pictures(out: Path) -> list[tuple[str | None, np.ndarray]]:
    """The format and pixels of the pictures in the tars of a data set."""
    found = []
    for tar in sorted(out.rglob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                extension = member.name.rpartition(".")[2]
                if extension not in ("json", "txt", "cls"):
                    content = members.extractfile(member).read()  # type: ignore[union-attr]
                    picture = Image.open(io.BytesIO(content))
                    found.append((picture.format, np.asarray(picture)))
    return found


# ---- FER2013 and FER+


@pytest.mark.parametrize("write", [sets.fer2013, sets.icml_face_data])
def test_fer2013_has_labels_by_number_and_three_splits(write: Any, pack_set: Any) -> None:
    found = pack_set("fer2013", write)
    rows = sorted((name, sample["label"], sample["split"]) for name, sample in found.samples.items())
    assert [row[1:] for row in rows] == list(zip(LABELS, SPLITS))
    assert found.refused == {}
    assert all(sample["attributes"] == {} for sample in found.samples.values())


def test_fer2013_has_the_pixels_of_the_table_without_loss(pack_set: Any, tmp_path: Path) -> None:
    pack_set("fer2013")
    found = pictures(tmp_path / "data/fer2013")
    assert {format for format, _ in found} == {"PNG"}
    assert {pixels_HW.shape for _, pixels_HW in found} == {(48, 48)}
    expected = {tuple(sets.grey_values(i)) for i in range(len(sets.ROWS))}
    assert {tuple(pixels_HW.ravel().tolist()) for _, pixels_HW in found} == expected


def test_fer2013_of_kaggles_competition_has_no_splits_so_that_they_are_drawn(pack_set: Any) -> None:
    found = pack_set("fer2013", sets.fer2013_competition)
    assert sorted(sample["label"] for sample in found.samples.values()) == sorted(LABELS)
    assert found.refused == {}
    assert set(found.column("split").values()) <= {"train", "val", "test"}


def test_fer2013_of_kaggle_has_label_folders(pack_set: Any) -> None:
    found = pack_set("fer2013", sets.fer2013_folders)
    assert {name: (s["label"], s["split"]) for name, s in found.samples.items()} == {
        "train/happy/Training_3908.jpg": ("happy", "train"),
        "train/neutral/Training_12.jpg": ("neutral", "train"),
        "test/happy/PublicTest_77.jpg": ("happy", "test"),
        "test/happy/PrivateTest_134207.jpg": ("happy", "test"),
    }


SHARES = {
    "fer0000000.png": {"neutral": 0.4, "sadness": 0.1, "anger": 0.3, "disgust": 0.2},
    "fer0000001.png": {"neutral": 6 / 8, "surprise": 1 / 8, "sadness": 1 / 8},
    "fer0010406.png": {"neutral": 4 / 8, "disgust": 3 / 8, "fear": 1 / 8},
}
"""Of the eight emotions; votes for `unknown` and `NF` do not count."""


def shares(sample: dict[str, Any]) -> dict[str, float]:
    return {label: share for label, share in sample["label_distribution"].items() if share}


def test_ferplus_has_votes_as_shares_and_refuses_rows_without_a_vote(pack_set: Any, tmp_path: Path) -> None:
    found = pack_set("FERPlus")
    assert {name: shares(sample) for name, sample in found.samples.items()} == SHARES
    assert len(found.samples["fer0000000.png"]["label_distribution"]) == 8
    assert found.column("label") == dict.fromkeys(SHARES, "neutral")
    assert found.column("split") == dict(zip(SHARES, ("train", "train", "test")))
    assert found.samples["fer0000001.png"]["attributes"] == {"unknown": 2, "NF": 0}
    assert set(found.refused) == {"fer2013new.csv, line 4", "fer0000003.png"}
    assert {detail[:38] for _, detail in found.refused.values()} == {"the column 'votes': no shares can be m"}
    found = {tuple(pixels_HW.ravel().tolist()) for _, pixels_HW in pictures(tmp_path / "data/ferplus")}
    assert found == {tuple(sets.grey_values(i)) for i in (0, 1, 4)}


def test_ferplus_has_folders_with_lists(pack_set: Any) -> None:
    found = pack_set("FERPlus", sets.ferplus_folders)
    folders = ("FER2013Train", "FER2013Train", "FER2013Test")
    assert {name: shares(sample) for name, sample in found.samples.items()} == {
        f"{folder}/{name}": found for folder, (name, found) in zip(folders, SHARES.items())
    }
    assert found.samples["FER2013Test/fer0010406.png"]["split"] == "test"


def test_tables_of_pixels_that_do_not_fit_are_refused(tmp_path: Path, pack_error: Any) -> None:
    sets.ferplus(tmp_path / "a")
    lines = (tmp_path / "a/fer2013new.csv").read_text().splitlines()
    (tmp_path / "a/fer2013new.csv").write_text("\n".join(lines[:-1]) + "\n")
    line = pack_error("a out --preset ferplus")
    assert "fer2013new.csv: has fewer rows than a/fer2013.csv" in line
    (tmp_path / "a/fer2013.csv").unlink()
    assert "SOURCE=a: lacks fer2013.csv or icml_face_data.csv" in pack_error("a out --preset ferplus")
    table(tmp_path / "b/fer2013.csv", ["emotion", "pixels", "Usage"], [0, "1 2 3", "Training"])
    assert "the column 'pixels' holds 3 values from 1 to 3, but 48 x 48" in pack_error(
        "b out --preset fer2013"
    )
    table(tmp_path / "b/fer2013.csv", ["emotion", "pixels", "Usage"], [0, "1 " * (1 << 17), "Training"])
    assert "the column 'pixels' holds 131072 values" in pack_error("b out --preset fer2013")
    table(tmp_path / "c/fer2013.csv", ["emotion", "pixels"], [0, "1 2 3"])
    assert "has no column 'Usage', which the preset names" in pack_error("c out --preset fer2013")


# ---- ArtEmis


def test_artemis_has_all_utterances_and_the_shares_of_their_emotions(pack_set: Any) -> None:
    found = pack_set("ArtEmis")
    ginoux = found.samples[f"Post_Impressionism/{sets.GINOUX}.jpg"]
    assert list(zip(ginoux["captions"], ginoux["attributes"]["emotion"])) == [
        ("She seems very happy being in the picture, and I want to know why.", "something else"),
        ("Her eyes are sad", "sadness"),
        ('A "calm" face', "contentment"),
        ("The colours are sombre", "sadness"),
        ("Her eyes are sad", "something else"),
    ]
    assert ginoux["label_distribution"] == {"something else": 0.4, "sadness": 0.4, "contentment": 0.2}
    assert ginoux["label"] == ""  # two are the most frequent
    portrait = found.samples[f"Baroque/{sets.PORTRAIT}.jpg"]
    assert (portrait["label"], portrait["label_distribution"]) == ("awe", {"awe": 1.0})
    assert portrait["captions"] == ["The detail of the collar is impressive", "The lace is so fine"]
    assert portrait["attributes"] == {"art_style": "Baroque", "emotion": "awe"}
    assert found.samples[f"Realism/{sets.GINOUX}.jpg"]["label_distribution"] == {"fear": 1.0}
    assert [reason for reason, _ in found.refused.values()] == ["unreadable"]
    assert len(found.samples) == 3


def test_artemis_without_wikiart_says_what_to_give(tmp_path: Path, pack_error: Any) -> None:
    sets.artemis(tmp_path / "a")
    (tmp_path / "a/wikiart").rename(tmp_path / "paintings")
    line = pack_error("a out --preset artemis")
    assert "SOURCE=a: has no folder wikiart or wiki_art" in line
    assert "or give --pictures DIR" in line


def test_artemis_as_preprocessed_has_the_splits_of_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets.artemis_preprocessed(tmp_path / "ArtEmis")
    command = "shards pack ArtEmis/preprocessed/artemis_preprocessed.csv out --preset artemis --persons none"
    assert run(command.split()) == 0
    found = samples(tmp_path / "out").values()
    assert {s["split"]: (s["label"], s["captions"]) for s in found} == {
        "train": ("", ["Her eyes are sad", "A calm face"]),
        "val": ("awe", ["The lace is so fine"]),
        "test": ("amusement", ["A farmer"]),
        "rest": ("fear", ["The same name in another style"]),
    }
    assert len(found) == 4


# ---- RAF-DB

FACES = {
    "train_00001": ("Sadness", "train"),
    "train_00002": ("Happiness", "train"),
    "test_0001": ("Surprise", "test"),
    "test_0002": ("Neutral", "test"),
}


def test_raf_db_has_labels_of_its_list_and_splits_of_its_names(pack_set: Any) -> None:
    found = pack_set("RAF-DB")
    assert {name: (s["label"], s["split"]) for name, s in found.samples.items()} == {
        f"{name}_aligned.jpg": facts for name, facts in FACES.items()
    }


def test_raf_db_of_kaggle_has_folders_of_numbers(pack_set: Any) -> None:
    found = pack_set("RAF-DB", sets.raf_db_kaggle)
    assert {name.rpartition("/")[2]: (s["label"], s["split"]) for name, s in found.samples.items()} == {
        f"{name}_aligned.jpg": facts for name, facts in FACES.items()
    }


def test_raf_db_without_its_list_is_an_error(tmp_path: Path, pack_error: Any) -> None:
    sets.raf_db(tmp_path / "a")
    (tmp_path / "a/basic/EmoLabel/list_patition_label.txt").unlink()
    assert "lacks EmoLabel/list_patition_label.txt" in pack_error("a out --preset raf-db")


# ---- AffectNet


def test_affectnet_has_expressions_and_values_but_not_minus_two(pack_set: Any) -> None:
    found = pack_set("AffectNet")
    assert {name: (s["label"], s["split"], s["attributes"]) for name, s in found.samples.items()} == {
        sets.HAPPY: (
            "Happiness",
            "train",
            {**box(134, 134, 899, 899), "valence": 0.785714, "arousal": -0.055556},
        ),
        sets.UPPER: ("Contempt", "train", {**box(30, 30, 201, 201), "valence": -0.44, "arousal": 0.31}),
        "12/0f3c.jpg": ("Neutral", "val", {**box(12, 8, 140, 140), "arousal": 0.5}),
    }
    reasons = {name: reason for name, (reason, _) in found.refused.items()}
    assert reasons == {"12/0f3a.jpg": "label", "12/0f3b.jpg": "label", "12/gone.jpg": "unreadable"}
    assert "'Non-Face' is not one of Neutral, Happiness" in found.refused["12/0f3a.jpg"][1]


def box(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"face_x": x, "face_y": y, "face_width": width, "face_height": height}


def test_affectnets_automatic_labels_are_read_where_no_manual_ones_are(pack_set: Any, tmp_path: Path) -> None:
    def write(root: Path) -> None:
        sets.affectnet_automatic(root)
        shutil.rmtree(root / "Manually_Annotated_file_lists")

    found = pack_set("AffectNet", write)
    assert {name: (s["label"], s["split"], s["attributes"]) for name, s in found.samples.items()} == {
        "1/a0.jpg": ("Happiness", "train", {**box(1, 2, 3, 4), "valence": 0.5, "arousal": 0.25}),
        "2/a2.jpg": ("Neutral", "train", {**box(1, 2, 3, 4), "valence": -0.1}),
    }
    assert {name: reason for name, (reason, _) in found.refused.items()} == {"1/a1.jpg": "label"}


def test_affectnets_manual_labels_go_before_automatic_ones_unless_that_table_is_given(
    tmp_path: Path,
) -> None:
    sets.affectnet_automatic(tmp_path)
    automatic = tmp_path / "Automatically_Annotated_file_lists/automatically_annotated.csv"
    for source, folder in (
        (tmp_path, "Manually_Annotated_Images"),
        (automatic, "Automatically_Annotated_Images"),
    ):
        opened = open_settings(PackSettings(str(source), None, preset="affectnet"))
        images = [str(record.image) for record in open_source(opened.layout, opened.place, opened.options)]
        assert images
        assert all(image.startswith(str(tmp_path / folder)) for image in images if image)


def test_affectnet_has_folders_of_numbers(pack_set: Any) -> None:
    found = pack_set("AffectNet", sets.affectnet_folders)
    assert {name: (s["label"], s["split"]) for name, s in found.samples.items()} == {
        "train/0/1.jpg": ("Neutral", "train"),
        "train/7/2.jpg": ("Contempt", "train"),
        "val/3/3.jpg": ("Surprise", "val"),
    }


def test_affectnet_of_2020_has_its_values_in_arrays(pack_set: Any) -> None:
    def write(root: Path) -> None:
        sets.affectnet_arrays(root / "AffectNet")
        annotations = root / "AffectNet/train_set/annotations"
        for number, value in (("5", np.array({"a": 1}, object)), ("6", np.array([1, 2])), ("7", np.array(2))):
            jpegs(root / "AffectNet/train_set/images", f"{number}.jpg")
            np.save(annotations / f"{number}_exp.npy", value)

    found = pack_set("AffectNet", write)
    assert {name: (s["label"], s["split"], s["attributes"]) for name, s in found.samples.items()} == {
        "train_set/images/3.jpg": ("Surprise", "train", {"valence": 0.43, "arousal": -0.1}),
        "val_set/images/14.jpg": ("Neutral", "val", {"valence": -0.5, "arousal": 0.0}),
    }
    details = {name: detail for name, (_, detail) in found.refused.items()}
    place = "its train_set/annotations"
    assert details["train_set/images/5.jpg"] == (
        f"{place}/5_exp.npy: not an array: holds pickled objects, which are not loaded"
    )
    assert details["train_set/images/6.jpg"] == (f"{place}/6_exp.npy: holds 2 values, but one is expected")
    assert details["train_set/images/7.jpg"].startswith(f"{place}/7_val.npy: ")


def test_affectnets_table_of_labels_goes_before_the_folders(pack_set: Any) -> None:
    found = pack_set("AffectNet", sets.affectnet_kaggle)
    assert found.column("label") == {
        "anger/image0000006.jpg": "Surprise",
        "happy/image0000010.jpg": "Happiness",
    }


def test_another_sets_preset_names_the_labels_it_found(tmp_path: Path, pack_error: Any) -> None:
    jpegs(tmp_path / "a", "calm/1.jpg", "upset/1.jpg")
    assert "it has 'calm', 'upset'; the preset has" in pack_error("a out --preset affectnet")
