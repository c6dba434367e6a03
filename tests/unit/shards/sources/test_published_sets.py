"""Published sets, packed by the commands of shards/sources/README.md: what is in the tars, by the rules of public
readers, written down by hand."""

from collections import Counter
from pathlib import Path
from typing import Any

import caption_sets
import face_sets
import pyarrow.parquet as pq
import pytest
from published_sets import SETS, pack_commands, text

from shards.format.manifest import read_manifest
from shards.pack.opening import open_settings
from shards.pack.settings import PackSettings
from shards.sources import open_source


@pytest.fixture
def pack(pack_set: Any) -> Any:
    """Writes a miniature, runs the command of the document for it, and returns its samples and the printed summary."""

    def packed(source: str) -> tuple[dict[str, dict[str, Any]], str]:
        found = pack_set(source)
        return found.samples, found.summary

    return packed


def counts(found: dict[str, dict[str, Any]], *fields: str) -> Counter[Any]:
    return Counter(tuple(sample[field] for field in fields) for sample in found.values())


def test_every_set_of_the_document_has_a_miniature() -> None:
    assert {caption_sets.flickr8k, face_sets.ferplus} <= set(SETS.values())  # from modules of their own
    assert sorted(words[2] for words in pack_commands()) == sorted(SETS)


# ---- the seven


def test_unbiased_emo_has_labels_above_its_search_engines(pack: Any) -> None:
    found, out = pack("UnBiasedEmo")
    assert (
        "found in UnBiasedEmo/images: 120 pictures, 6 labels, 3 splits (drawn: train 70, val 10, test 20)\n"
        in out
    )
    assert found["joy/bing/3.jpg"]["label"] == "joy"
    labels = ("anger", "fear", "joy", "love", "sadness", "surprise")
    shares = {"train": 14, "val": 2, "test": 4}
    assert counts(found, "label", "split") == {
        (label, split): count for label in labels for split, count in shares.items()
    }


def test_heco_has_persons_with_boxes_labels_and_vad(pack: Any) -> None:
    found, out = pack("HECO")
    assert (
        "found: 3 pictures, 2 labels, 1 split (drawn: train 70, val 10, test 20), 5 persons with 4 labels and VAD"
        in out
    )
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
    assert "found: 35 pictures, 7 labels, 3 splits (drawn from test: test 66, val 34)\n" in out
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


def refusals(out: Path) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(out / "rejected.parquet").to_pylist()
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


EIGHT = ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness")


def test_fi_has_label_folders_below_emotion_dataset(pack: Any) -> None:
    found, out = pack("FI")
    assert "found in FI/emotion_dataset: 160 pictures, 8 labels, 3 splits" in out
    shares = {"train": 16, "val": 1, "test": 3}
    assert counts(found, "label", "split") == {(label, s): n for label in EIGHT for s, n in shares.items()}


def test_fis_votes_give_the_label_of_their_file_to_pictures_that_most_agreed_on(
    pack: Any, tmp_path: Path
) -> None:
    found, out = pack("you_imemo")
    assert "found: 4 pictures, 2 labels" in out
    assert found["amusement/123_abc.jpg"]["label"] == "amusement"
    assert found["amusement/123_abc.jpg"]["attributes"]["agree"] == 4
    assert found["fear/126_abc.jpg"]["label"] == "fear"
    refused = refusals(tmp_path / "data/fi_votes")
    assert refused["agg/amusement_result.csv, line 2"] == (
        "annotation",
        "agree=2 is not more than disagree=3",
    )
    [twice] = {"amusement/125_abc.jpg", "fear/125_abc.jpg"} & set(refused)  # the other one is packed
    assert refused[twice][0] in ("conflict", "leak")
    assert len(found) == 3


def test_emotic_as_csv_has_persons_with_categories_and_vad(pack: Any, tmp_path: Path) -> None:
    found, out = pack("EMOTIC")
    assert "found: 3 pictures, 3 splits, 4 persons with 5 categories and VAD" in out
    for split in ("train", "val", "test"):
        manifest = read_manifest(tmp_path / "data/emotic" / split, "OUT")
        assert manifest.provenance["dimension_ranges"] == {
            name: [1.0, 10.0] for name in ("arousal", "dominance", "valence")
        }
    one = found["mscoco/images/COCO_1.jpg"]
    assert one["split"] == "train"
    assert one["persons"] == [
        {
            "box": [0.0, 0.0, 1.0, 1.0],
            "score": 1.0,
            "labels": {
                "categories": ["Peace"], "valence": 6.5, "arousal": 4.0, "dominance": 7.0,
                "gender": "Female", "age": "Kid",
            },
        },
        {
            "box": [0.0, 0.0, 0.5, 1.0],
            "score": 1.0,
            "labels": {
                "categories": ["Disconnection", "Doubt/Confusion"], "valence": 5.0, "arousal": 3.0, "dominance": 9.0,
                "gender": "Male", "age": "Adult",
            },
        },
    ]  # fmt: skip
    assert found["mscoco/images/COCO_2.jpg"]["split"] == "val"
    assert found["mscoco/images/COCO_3.jpg"]["persons"][0]["labels"]["categories"] == ["Disquietment"]


def test_emotic_as_arrays_has_its_pictures_and_scaled_boxes(pack: Any) -> None:
    found, out = pack("archive")
    assert "found: 4 pictures, 3 splits, 5 persons with 3 categories and VAD" in out
    one = found["img_arr_train_0.npy"]
    assert [person["box"] for person in one["persons"]] == [[0.0, 0.0, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]]
    assert [person["labels"]["categories"] for person in one["persons"]] == [
        ["Doubt/Confusion", "Peace"],
        ["Fear"],
    ]
    assert (one["width"], one["height"]) == (24, 24)
    assert counts(found, "split") == {("train",): 2, ("val",): 1, ("test",): 1}


def test_emoset_as_parquet_has_the_names_of_its_classes_and_the_splits_of_its_files(pack: Any) -> None:
    found, out = pack("EmoSet-118K-hf")
    assert "found in EmoSet-118K-hf/data: 32 pictures, 8 labels, 3 splits\n" in out
    shares = {"train": 2, "val": 1, "test": 1}
    assert counts(found, "label", "split") == {(label, s): n for label in EIGHT for s, n in shares.items()}
    assert all(sample["attributes"]["emotion"] == sample["label"] for sample in found.values())


def test_emo8_has_split_folders_and_labels_in_title_case(pack: Any) -> None:
    found, _ = pack("Emo8")
    shares = {"train": 3, "val": 1, "test": 1}
    assert counts(found, "label", "split") == {(label, s): n for label in EIGHT for s, n in shares.items()}


# ---- further emotion sets


def test_artphoto_has_labels_in_its_file_names(pack: Any) -> None:
    found, _ = pack("ArtPhoto")
    assert counts(found, "label") == {(label,): 2 for label in EIGHT}
    assert found["sad_0001.jpg"]["label"] == "sadness"


def test_abstract_has_votes_as_distributions_and_no_label_where_they_tie(pack: Any, tmp_path: Path) -> None:
    found, _ = pack("Abstract")
    first = found["abstract_0001.jpg"]
    assert (first["label"], first["label_distribution"]) == (
        "excitement",
        {
            "amusement": 1 / 14, "anger": 1 / 14, "awe": 1 / 14, "contentment": 2 / 14, "disgust": 0,
            "excitement": 6 / 14, "fear": 3 / 14, "sadness": 0,
        },
    )  # fmt: skip
    assert found["abstract_0002.jpg"]["label"] == ""
    assert found["abstract_0002.jpg"]["label_distribution"]["contentment"] == 5 / 16
    [(reason, detail)] = refusals(tmp_path / "data/abstract").values()
    assert (reason, detail.startswith("the column 'votes': no shares can be made")) == ("annotation", True)


def test_emotionroi_leaves_its_masks_out_and_takes_its_lists(pack: Any, tmp_path: Path) -> None:
    found, _ = pack("EmotionROI")
    labels = ("anger", "disgust", "fear", "joy", "sadness")
    assert {name: sample["split"] for name, sample in found.items()} == {
        f"{label}/{i}.jpg": split for label in labels for i, split in ((1, "train"), (2, "test"))
    }
    assert refusals(tmp_path / "data/emotionroi")["surprise/1.jpg"] == (
        "annotation", "none of training.txt, testing.txt names it",
    )  # fmt: skip


def test_pandas_emotion_6_takes_the_first_folder_as_the_label(pack: Any) -> None:
    found, _ = pack("Emotion-6")
    assert found["anger/digust/1.jpg"]["label"] == "anger"
    assert counts(found, "label")["surprise",] == 10


def test_webemo_has_names_for_its_numbers(pack: Any) -> None:
    found, _ = pack("WEBEmo")
    assert {name: (sample["label"], sample["split"]) for name, sample in found.items()} == {
        "train/5/a.jpg": ("disgust", "train"),
        "train/11/b.jpg": ("irritabilty", "train"),
        "test/1/c.jpg": ("cheerfullness", "test"),
    }


TWITTER = {"288_463_Bm.jpg": "negative", "335_466_Bj.jpg": "positive", "400_1_B.jpg": "positive"}


def test_twitter_i_has_the_labels_of_its_list_and_the_shares_of_its_votes(pack: Any) -> None:
    found, out = pack("Twitter_PCNN")
    assert "3 pictures, 2 labels, 3 distributions" in out
    assert {name: sample["label"] for name, sample in found.items()} == TWITTER
    assert {name: sample["label_distribution"]["positive"] for name, sample in found.items()} == {
        "288_463_Bm.jpg": 0.2, "335_466_Bj.jpg": 1.0, "400_1_B.jpg": 0.6,
    }  # fmt: skip
    assert found["400_1_B.jpg"]["attributes"] == {}


def test_twitter_i_has_the_label_of_most_votes_without_its_lists(pack_set: Any) -> None:
    def write(root: Path) -> None:
        SETS["Twitter_PCNN"](root)
        for name in ("three", "four", "five"):
            (root / f"{name}_agree.txt").unlink()

    assert pack_set("Twitter_PCNN", write).column("label") == TWITTER


@pytest.mark.parametrize(("name", "count"), [("three", 3), ("four", 2), ("five", 1)])
def test_each_list_of_twitter_i_is_a_source(name: str, count: int, tmp_path: Path) -> None:
    SETS["Twitter_PCNN"](tmp_path)
    found = listed(tmp_path / f"{name}_agree.txt", "twitter-i")
    assert len(found) == count
    assert all(label in ("0", "1", "negative", "positive") for _, _, label, _ in found)


@pytest.mark.parametrize("source", ["Flickr_LDL", "Twitter_LDL"])
def test_ldl_sets_have_votes_as_distributions(source: str, pack: Any, tmp_path: Path) -> None:
    found, _ = pack(source)
    assert found["1.jpg"]["label_distribution"] == {
        "amusement": 0, "awe": 1 / 11, "contentment": 8 / 11, "excitement": 2 / 11, "anger": 0, "disgust": 0,
        "fear": 0, "sadness": 0,
    }  # fmt: skip
    assert [found[f"{i}.jpg"]["label"] for i in (1, 2, 3)] == ["contentment", "excitement", ""]
    assert list(refusals(tmp_path / "data" / source.lower())) == ["ground_truth.txt, line 5"]


def test_ldl_sets_may_have_two_lists(pack_set: Any) -> None:
    def write(root: Path) -> None:
        SETS["Flickr_LDL"](root)
        head, *rows = (root / "ground_truth.txt").read_text().splitlines()
        (root / "ground_truth.txt").unlink()
        text(root / "train_ground_truth.txt", head, *rows[:2])
        text(root / "test_ground_truth.txt", head, rows[2])

    found = pack_set("Flickr_LDL", write)
    assert found.column("split") == {"1.jpg": "train", "2.jpg": "train", "3.jpg": "test"}


def test_oasis_has_valence_and_arousal_of_named_pictures(pack: Any) -> None:
    found, _ = pack("OASIS")
    assert found["Acorns 1.jpg"]["attributes"] == {
        "valence": 4.68627451, "arousal": 2.346534653, "Theme": "Acorns 1", "Category": "Object", "Source": "Pixabay",
    }  # fmt: skip
    assert found["Angry face 4.jpg"]["attributes"]["valence"] == 2.49
    assert found["Acorns 1.jpg"]["label"] == ""


def test_gaped_has_valence_and_arousal_beside_its_folders(pack: Any) -> None:
    found, _ = pack("GAPED")
    values = {name: (s["attributes"]["valence"], s["attributes"]["arousal"]) for name, s in found.items()}
    assert values == {"A/A001.bmp": (27.4507, 59.1026), "Sn/Sn001.bmp": (35.1, 61.0)}
    assert found["A/A001.bmp"]["attributes"]["original_format"] == "BMP"


def test_iaps_has_three_dimensions_below_a_text(pack: Any) -> None:
    found, out = pack("IAPS")
    values = {
        name: [sample["attributes"][dimension] for dimension in ("valence", "arousal", "dominance")]
        for name, sample in found.items()
    }
    assert values == {"1050.jpg": [3.46, 6.87, 3.08], "2055.1.jpg": [2.03, 4.9, 3.8]}
    assert found["1050.jpg"]["attributes"]["description"] == "Snake"
    assert found["1050.jpg"]["attributes"]["set"] == 2  # of the first of its two rows
    note = "1 row of AllSubjects_1-20.txt left out: of several rows of a picture the first one counts"
    assert note in out


def listed(source: Path, preset: str) -> list[tuple[Any, ...]]:
    """The records of a set whose pictures are on the web; nothing is downloaded."""
    opened = open_settings(PackSettings(str(source), None, preset=preset))
    found = open_source(opened.layout, opened.place, opened.options)
    return [(record.image, record.split, record.label, record.captions) for record in found]


def test_webemos_lists_of_urls_are_read(tmp_path: Path) -> None:
    text(tmp_path / "webemo/train25.txt", "https://x/a.jpg 5")
    text(tmp_path / "webemo/test25.txt", "https://x/b.jpg 24")
    assert listed(tmp_path / "webemo", "webemo") == [
        ("https://x/a.jpg", "train", "5", ()),  # 5 is disgust, by the preset's synonyms
        ("https://x/b.jpg", "test", "24", ()),
    ]
