"""Copies of published sets that differ from the published form: case, files of macOS, missing and wrong parts."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published_sets import jpegs, refusals, samples, table, text

from shards.sources.values import load_array

HECO = ["Image", "xmin", "ymin", "xmax", "ymax", "Category", "Valence", "Arousal", "Dominance"]
GROUND_TRUTH = "file\tvalence\tarousal\tanger\tdisgust\tfear\tjoy\tsadness\tsurprise\tneutral"


def ground_truth(path: Path, *names: str) -> None:
    text(path, GROUND_TRUTH, *(f"{name}\t9\t1\t0\t0\t0\t1\t0\t0\t0" for name in names))


# ---- case


def test_rows_name_their_pictures_in_any_case(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "Images/Joy/1.JPG", "Images/Joy/2.jpg", "Images/Fear/1.jpg", "Images/Fear/1.JPG")
    ground_truth(tmp_path / "set/ground_truth.txt", "joy/1.jpg", "JOY/2.jpg", "Fear/1.jpg", "fear/1.Jpg")
    assert command("set out --preset emotion6")[0] == 0
    found = {name: sample["attributes"] for name, sample in samples(tmp_path / "out").items()}
    vad = {"valence": 9.0, "arousal": 1.0}
    # fear/1.Jpg could be each of both pictures.
    assert found == {"Joy/1.JPG": vad, "Joy/2.jpg": vad, "Fear/1.jpg": vad, "Fear/1.JPG": {}}
    assert refusals(tmp_path / "out") == {
        "fear/1.Jpg": ("unreadable", "ground_truth.txt, line 5 names it, but there is no such file")
    }


def test_a_table_of_a_set_names_its_pictures_in_any_case(tmp_path: Path, command: Any) -> None:
    table(tmp_path / "set/Labels/HECO_Labels.csv", HECO, ["a_1.jpg", 0, 0, 24, 16, "Fear", 5, 5, 5])
    jpegs(tmp_path / "set", "Data/A_1.JPG")
    assert command("set out --preset heco")[0] == 0
    [person] = samples(tmp_path / "out")["a_1.jpg"]["persons"]
    assert person["box"] == [0.0, 0.0, 0.5, 0.5]


# ---- files of other systems


def test_files_that_macos_writes_beside_pictures_are_counted_and_not_refused(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set", "joy/1.jpg", "joy/._real.jpg")
    (tmp_path / "set/joy/._1.jpg").write_bytes(bytes.fromhex("00051607") + bytes(60))
    (tmp_path / "set/joy/1.jpg.x").write_bytes(b"x")
    code, out, _ = command("set out --preset ube")
    assert code == 0
    assert "2 records = 2 packed + 0 refused" in out
    assert "not pictures: 1 .jpg, 1 .x" in out
    assert "found: 2 pictures, 1 label" in out


# ---- missing and wrong parts


def test_persons_of_a_set_without_its_table_name_the_table(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "Data/Fear/1.jpg", "Data/Anger/1.jpg")
    code, _, err = command("set out --preset heco --persons source")
    assert code == 2
    assert err == (
        "uniemox: error: --persons=source: SOURCE=set lacks Labels/HECO_Labels.csv, so that --preset heco finds label "
        "folders only; copy it there, or give --persons nanodet or none\n"
    )
    code, out, _ = command("set out --preset heco")
    assert code == 0
    assert "read as label folders, because SOURCE lacks Labels/HECO_Labels.csv" in out


def test_folders_that_look_alike_name_the_file_that_would_decide(tmp_path: Path, pack_error: Any) -> None:
    jpegs(tmp_path / "set", "image/awe/1.jpg", "annotation/awe/1.jpg")
    assert pack_error("set out --preset emoset") == (
        "uniemox: error: SOURCE=set: has 2 folders that look like --preset emoset (set/annotation, set/image) and "
        "lacks info.json or data/*.parquet; give one of them, or add it\n"
    )


def test_a_table_of_which_no_row_names_a_picture_is_an_error(tmp_path: Path, pack_error: Any) -> None:
    jpegs(tmp_path / "set", "images/joy/1.jpg")
    ground_truth(tmp_path / "set/ground_truth.txt", "photos/joy/1.jpg", "photos/joy/2.jpg")
    assert pack_error("set out --preset emotion6") == (
        "uniemox: error: SOURCE=set/images: none of the 2 rows of set/ground_truth.txt belongs to a picture there; the "
        "first: ground_truth.txt, line 2 names 'photos/joy/1.jpg'\n"
    )
    text(tmp_path / "set/ground_truth.txt", GROUND_TRUTH, "joy/1.jpg 9 1 0 0 0 1 0 0 0")
    assert "the first: ground_truth.txt, line 2: has 1 value for 10 columns" in pack_error(
        "set out --preset emotion6"
    )


def test_a_list_of_one_split_may_name_no_picture_of_a_part_of_the_set(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "images/joy/1.jpg")
    text(tmp_path / "set/training_testing_split/training.txt", "joy/1.jpg")
    text(tmp_path / "set/training_testing_split/testing.txt", "joy/2.jpg")
    assert command("set out --preset emotionroi")[0] == 0
    assert refusals(tmp_path / "out")["joy/2.jpg"][0] == "unreadable"


def test_a_picture_in_two_lists_stays_in_test_and_the_other_row_is_a_leak(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set", "images/joy/1.jpg", "images/joy/2.jpg")
    text(tmp_path / "set/training_testing_split/training.txt", "joy/1.jpg", "joy/2.jpg")
    text(tmp_path / "set/training_testing_split/testing.txt", "joy/2.jpg")
    assert command("set out --preset emotionroi")[0] == 0
    found = {name: sample["split"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"joy/1.jpg": "train", "joy/2.jpg": "test"}
    assert refusals(tmp_path / "out") == {
        "joy/2.jpg": ("leak", "training.txt, line 2 names it, but it is in split test")
    }


def test_the_summary_names_labels_that_the_preset_lacks_and_doubts_it_if_they_are_many(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set", *(f"joy/{i}.jpg" for i in range(10)), "awe/1.jpg")
    _, out, _ = command("set out --preset ube")
    assert "refused for labels that the preset does not have: awe (1)\n" in out
    jpegs(tmp_path / "set", "awe/2.jpg", "pride/1.jpg")
    _, out, _ = command("set more --preset ube")
    assert "preset does not have: awe (2), pride (1); is it the preset of this set?\n" in out


def test_a_person_beyond_emotics_scale_refuses_its_picture(tmp_path: Path, command: Any) -> None:
    header = ["Folder", "Filename", "Image Size", "BBox", "Categorical_Labels", "Continuous_Labels"]
    jpegs(tmp_path / "set", "emotic/mscoco/images/1.jpg", "emotic/mscoco/images/2.jpg")
    table(
        tmp_path / "set/emotic_pre/train.csv", header,
        ["mscoco/images", "1.jpg", "[48, 32]", "[0, 0, 24, 32]", "['Fear']", "[1, 10, 5.5]"],
        ["mscoco/images", "2.jpg", "[48, 32]", "[0, 0, 24, 32]", "['Fear']", "[11, 5, 5]"],
    )  # fmt: skip
    assert command("set out --preset emotic --persons source")[0] == 0
    assert list(samples(tmp_path / "out")) == ["mscoco/images/1.jpg"]
    assert refusals(tmp_path / "out") == {
        "mscoco/images/2.jpg": ("annotation", "persons.0.valence: 11 is beyond 1 to 10")
    }


def test_boxes_in_fractions_are_clipped_left_out_and_refused_like_those_in_pixels(
    tmp_path: Path, command: Any
) -> None:
    form = "{files: t.csv, columns: {path: name, label: mood}, persons: {box: box, unit: fractions}}"
    text(tmp_path / "mine.yaml", f"labels: [calm, upset]\nlayout: table\ntables: [{form}]")
    jpegs(tmp_path / "set", "1.jpg", "2.jpg", "3.jpg")
    table(
        tmp_path / "set/t.csv", ["name", "mood", "box"],
        ["1.jpg", "calm", "[0.5, 0.5, 0.75, 0.75]"], ["1.jpg", "upset", "[0.25, 0.5, 1.5, 1]"],
        ["1.jpg", "calm", "[0.5, 0.5, 0.5, 1]"], ["1.jpg", "calm", "[2, 2, 3, 3]"],
        ["2.jpg", "calm", "[10, 10, 30, 20]"], ["3.jpg", "calm", "[0.5, 0.25, 0.5, 0.5]"],
    )  # fmt: skip
    assert command("set out --preset mine.yaml")[0] == 0
    [found] = samples(tmp_path / "out").values()
    assert [(person["box"], person["labels"]["label"]) for person in found["persons"]] == [
        ([0.25, 0.5, 1.0, 1.0], "upset"),
        ([0.5, 0.5, 0.75, 0.75], "calm"),
    ]
    nobody = ("annotation", "no annotated person's box is inside the picture")
    assert refusals(tmp_path / "out") == {"2.jpg": nobody, "3.jpg": nobody}


def test_a_split_that_is_none_of_the_presets_refuses_its_row(tmp_path: Path, command: Any) -> None:
    text(
        tmp_path / "mine.yaml",
        "layout: table\nfind: t.csv\ntables:\n"
        "  - {files: t.csv, columns: {path: name, split: use}, values: {split: {Training: train, restval: train}}}",
    )
    jpegs(tmp_path / "set", *(f"{i}.jpg" for i in range(5)))
    table(
        tmp_path / "set/t.csv", ["name", "use"],
        ["0.jpg", "Training"], ["1.jpg", "restval"], ["2.jpg", "Test"], ["3.jpg", "train"], ["4.jpg", "Weird"],
    )  # fmt: skip
    assert command("set out --preset mine.yaml")[0] == 0
    found = {name: sample["split"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"0.jpg": "train", "1.jpg": "train", "2.jpg": "test", "3.jpg": "train"}
    assert refusals(tmp_path / "out") == {
        "t.csv, line 6": ("annotation", "'Weird' is no split; the preset knows Training, restval")
    }


def test_a_row_without_a_vote_counts_for_nothing(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "wikiart/Cubism/a.jpg", "wikiart/Cubism/b.jpg")
    table(
        tmp_path / "set/artemis_dataset_release_v0.csv", ["art_style", "painting", "emotion", "utterance"],
        ["Cubism", "a", "", "first"], ["Cubism", "a", "awe", "second"], ["Cubism", "a", "awe", "third"],
        ["Cubism", "a", "fear", "fourth"], ["Cubism", "b", "", "alone"],
    )  # fmt: skip
    assert command("set out --preset artemis")[0] == 0
    found = samples(tmp_path / "out")["Cubism/a.jpg"]
    assert found["label_distribution"] == {"awe": pytest.approx(2 / 3), "fear": pytest.approx(1 / 3)}
    assert (found["label"], found["captions"]) == ("awe", ["first", "second", "third", "fourth"])
    assert refusals(tmp_path / "out")["Cubism/b.jpg"][0] == "label"


def test_an_array_of_a_missing_number_is_no_attribute(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "train_set/images/1.jpg", "val_set/images/2.jpg")
    for place, values in {"train_set": ("1", np.nan, "0.5"), "val_set": ("2", "-1", "1")}.items():
        folder = tmp_path / "set" / place / "annotations"
        folder.mkdir()
        for kind, value in zip(("exp", "val", "aro"), values):
            np.save(folder / f"{1 + (place == 'val_set')}_{kind}.npy", np.array(value))
    code, out, _ = command("set out --preset affectnet")
    assert code == 0
    assert "read as label folders" not in out
    found = {name: sample["attributes"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {
        "train_set/images/1.jpg": {"arousal": 0.5},
        "val_set/images/2.jpg": {"valence": -1.0, "arousal": 1.0},
    }


def npy(kind: str, shape: str, data: bytes = b"") -> bytes:
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}"
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "EOF: reading magic string"),
        (b"PK\x03\x04junk", "the magic string is not correct"),
        (npy("|u1", "(100000, 100000, 300)"), "has 0 bytes of values, but its header states 3000000000000"),
        (npy("|u1", "(-1, 3)"), "its header states -3"),
        (npy("|u1", "(2,)", b"abc"), "has 3 bytes of values, but its header states 2"),
        (npy("|O", "()", b"12345678"), "holds pickled objects"),
        (npy("|u1", "(" * 40), "EOF in multi-line statement"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_array_is_a_value_error_and_asks_for_no_memory(data: bytes, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"^not an array: .*{re.escape(wanted)}"):
        load_array(data)


def test_arrays_are_read_as_numpy_reads_them() -> None:
    for array in (np.array("3"), np.array([[1.5, 2.5]]), np.asfortranarray(np.arange(6).reshape(2, 3))):
        file = io.BytesIO()
        np.save(file, array)
        assert np.array_equal(load_array(file.getvalue()), array)


# ---- records of JSON, pictures in columns, and columns that are not there


def test_a_field_that_the_first_records_of_json_lack_is_a_missing_value(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "Images/1.jpg", "Images/2.jpg")
    text(
        tmp_path / "set/dataset_flickr8k.json",
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": []}, '
        '{"filename": "2.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}]}',
    )
    assert command("set out --preset flickr8k")[0] == 0
    found = {name: sample["captions"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"1.jpg": [], "2.jpg": ["a dog"]}


def test_a_field_that_the_first_line_of_json_lines_lacks_is_a_missing_value(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set", "1.jpg", "2.jpg")
    text(tmp_path / "set/t.jsonl", '{"p": "1.jpg"}', '{"p": "2.jpg", "c": "a dog"}')
    text(
        tmp_path / "mine.yaml",
        "layout: table\nfind: t.jsonl\ntables: [{files: t.jsonl, columns: {path: p, caption: c}}]",
    )
    assert command("set out --preset mine.yaml")[0] == 0
    found = {name: sample["captions"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"1.jpg": [], "2.jpg": ["a dog"]}


def test_a_preset_may_name_a_column_of_pictures(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "1.jpg", "2.jpg", "3.jpg")
    data = [(tmp_path / f"set/{i}.jpg").read_bytes() for i in (1, 2)]
    pictures = [
        {"bytes": data[0], "path": "x"},
        {"bytes": data[1], "path": None},
        {"bytes": None, "path": "3.jpg"},
    ]
    pq.write_table(
        pa.table({"photo": pictures, "mood": ["calm", "upset", "calm"]}), tmp_path / "set/t.parquet"
    )
    text(
        tmp_path / "mine.yaml",
        "labels: [calm, upset]\nlayout: table\nfind: t.parquet\n"
        "tables: [{files: t.parquet, columns: {image: photo, label: mood}, attributes: [mood, age]}]",
    )
    code, out, err = command("set out --preset mine.yaml")
    assert code == 0, err
    assert "without age, which t.parquet does not have" in out
    found = {name: sample["label"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"t.parquet, line 1": "calm", "t.parquet, line 2": "upset", "3.jpg": "calm"}


def test_a_table_with_a_delimiter_calls_its_pictures_path_or_image(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "1.jpg")
    text(tmp_path / "set/t.csv", "image;label", "1.jpg;calm")
    assert command("set/t.csv out --delimiter ;")[0] == 0
    assert samples(tmp_path / "out")["1.jpg"]["label"] == "calm"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("set/t.csv out --columns caption,mood", "none of its columns (caption, mood) names the pictures"),
        ("set/t.jsonl out --columns path,mood", "t.jsonl states its columns itself; leave both out"),
        ("set/t.parquet out --delimiter ;", "--columns and --delimiter: t.parquet states its columns itself"),
        ("set out --preset emotic --pictures x", "--pictures: --layout emotic finds its pictures itself; leave it out"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_one_line(
    line: str, wanted: str, tmp_path: Path, pack_error: Any
) -> None:
    text(tmp_path / "set/t.csv", "a,b")
    text(tmp_path / "set/t.jsonl", '{"path": "1.jpg"}')
    pq.write_table(pa.table({"path": ["1.jpg"]}), tmp_path / "set/t.parquet")
    assert wanted in pack_error(line)


def test_rows_of_one_picture_with_different_labels_are_a_conflict(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "Image/aligned/train_1_aligned.jpg", "Image/aligned/test_1_aligned.jpg")
    rows = ("train_1.jpg 5", "train_1.jpg 6", "test_1.jpg 1")
    text(tmp_path / "set/EmoLabel/list_patition_label.txt", *rows)
    assert command("set out --preset raf-db")[0] == 0
    assert refusals(tmp_path / "out") == {
        "train_1_aligned.jpg": ("conflict", "its rows state different labels ('Sadness' and 'Anger')")
    }
