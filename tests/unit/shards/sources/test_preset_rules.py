"""What presets do with copies of sets that are incomplete or have more than one meaning, by the rules that
shards/sources/README.md states."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import caption_sets
import face_sets
import pyarrow.parquet as pq
import pytest
from published_sets import SETS, jpegs, samples, text

from shards.pack.opening import open_settings
from shards.pack.settings import PackSettings
from shards.sources import open_source
from shards.sources.presets import load_presets
from uniemox_dist.cli.main import run

assert {caption_sets.flickr8k, face_sets.artemis} <= set(SETS.values())  # from modules of their own


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a pack that must succeed; returns its summary."""

    def packed(line: str) -> str:
        monkeypatch.chdir(tmp_path)
        code = run(["shards", "pack", *line.split(), "--persons", "none", "--workers", "0"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return packed


# ---- SOURCE is a part of a set


@pytest.mark.parametrize(
    ("source", "part", "preset", "lacks", "root"),
    [
        ("Emotion6", "images", "emotion6", "ground_truth.txt", ""),
        ("HECO", "Data", "heco", "Labels/HECO_Labels.csv", ""),
        ("HECO", "Labels", "heco", "Labels/HECO_Labels.csv", ""),
        ("you_imemo", "agg/imgs", "fi", "agg/amusement_result.csv", ""),
        ("EmotionROI", "EmotionROI/images", "emotionroi", "training_testing_split/training.txt", "/EmotionROI"),
        ("ArtEmis", "wikiart", "artemis", "artemis_dataset_release_v0.csv", ""),
        ("AffectNet", "Manually_Annotated_Images", "affectnet", "Manually_Annotated_file_lists/training.csv", ""),
        ("RAF-DB", "basic/Image/aligned", "raf-db", "EmoLabel/list_patition_label.txt", "/basic"),
        ("Twitter_PCNN", "Agg_AMT_Candidates", "twitter-i", "three_agree.txt", ""),
        ("Flickr_LDL", "images", "flickr-ldl", "ground_truth.txt", ""),
        ("OASIS", "images", "oasis", "OASIS.csv", ""),
        ("GAPED", "GAPED/A", "gaped", "A_with SD.txt", "/GAPED"),
        ("Flickr8k", "Flicker8k_Dataset", "flickr8k", "Flickr8k_text/Flickr8k.token.txt", ""),
        ("flickr30k_images", "flickr30k_images", "flickr30k", "results.csv", ""),
        ("coco-karpathy", "val2014", "coco-karpathy", "dataset_coco.json", ""),
        ("img2dataset-files", "00000", "img2dataset", "00000_stats.json", ""),
    ],
)  # fmt: skip
def test_a_part_of_a_set_is_refused_with_the_folder_that_has_its_tables(
    source: str, part: str, preset: str, lacks: str, root: str, tmp_path: Path, pack_error: Any
) -> None:
    SETS[source](tmp_path / source)
    line = pack_error(f"{source}/{part} out --preset {preset}")
    assert line.startswith(
        f"uniemox: error: SOURCE={source}/{part}: is a part of --preset {preset}, whose {lacks} is in {source}{root}; "
        f"give SOURCE={source}{root}"
    )


def test_the_folder_above_is_given_as_the_user_would_write_it(
    tmp_path: Path, pack_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    SETS["Emotion6"](tmp_path)
    assert "is in .; give SOURCE=.; " in pack_error("images out --preset emotion6")
    assert f"give SOURCE={tmp_path}; " in pack_error(f"{tmp_path}/images out --preset emotion6")


def test_pictures_of_a_set_can_be_packed_without_its_tables(
    tmp_path: Path, pack_error: Any, command: Any
) -> None:
    SETS["Emotion6"](tmp_path / "set")
    line = pack_error("set/images out --preset emotion6")
    assert line.endswith("give SOURCE=set; --pictures . packs this folder alone\n")
    out = command("set/images out --preset emotion6 --pictures .")
    assert "60 pictures, 6 labels, 3 splits" in out


def test_emosets_picture_folder_is_refused_although_its_folders_are_labels(
    tmp_path: Path, pack_error: Any
) -> None:
    jpegs(tmp_path / "EmoSet-118K/image", "anger/anger_1.jpg", "awe/awe_2.jpg")
    (tmp_path / "EmoSet-118K/info.json").write_text("{}")
    line = pack_error("EmoSet-118K/image out --preset emoset")
    assert "is a part of --preset emoset, whose info.json is in EmoSet-118K" in line


def test_a_set_beside_another_copy_is_no_part_of_it(tmp_path: Path, pack_error: Any) -> None:
    SETS["HECO"](tmp_path)
    jpegs(tmp_path / "label_folders", "Joyful/1.jpg")
    assert "none of its labels is one of the preset's" in pack_error("label_folders out --preset heco")


# ---- Parquet without names of classes


def nameless_parquet(root: Path, *columns: str) -> None:
    """EmoSet's or Emo8's Parquet files as other programs write them: without the features of `datasets`."""
    SETS["EmoSet-118K-hf"](root)
    for path in (root / "data").glob("*.parquet"):
        table = pq.read_table(path).replace_schema_metadata(None)
        pq.write_table(table.select(["image", *columns]), path)


@pytest.mark.parametrize("preset", ["emoset", "emo8"])
def test_numbers_without_names_give_way_to_a_column_of_texts(
    preset: str, tmp_path: Path, command: Any
) -> None:
    nameless_parquet(tmp_path / "set", "label", "image_id", "emotion")
    assert "32 pictures, 8 labels, 3 splits" in command(f"set out --preset {preset}")
    found = samples(tmp_path / "out").values()
    assert {sample["label"] for sample in found} == set(load_presets()[preset].labels)
    assert all(sample["attributes"]["image_id"].startswith(f"{sample['label']}_") for sample in found)
    assert {sample["attributes"]["label"] for sample in found} == set(range(8))
    nameless_parquet(tmp_path / "texts", "emotion")
    assert "32 pictures, 8 labels, 3 splits" in command(f"texts more --preset {preset}")
    chosen = command(f"set chosen --preset {preset} --column label=emotion")
    assert "32 pictures, 8 labels, 3 splits" in chosen


def test_numbers_without_names_alone_say_how_to_name_them(
    tmp_path: Path, pack_error: Any, command: Any
) -> None:
    nameless_parquet(tmp_path / "set", "label", "image_id")
    line = pack_error("set out --preset emoset")
    assert "it has '0', '1', '2', '3', '4', '5', '6', '7'; the preset has" in line
    assert (
        "they are numbers without names: name a column of texts with --column label=NAME, or state the names in a "
        "--preset FILE.yaml (`synonyms: {0: NAME}`)" in line
    )
    names = "{0: a, 1: b, 2: a, 3: a, 4: a, 5: a, 6: a, 7: a}"
    (tmp_path / "mine.yaml").write_text(
        f"labels: [a, b]\nsynonyms: {names}\nlayout: table\nfind: data/*.parquet\n"
    )
    assert "32 pictures, 2 labels, 3 splits" in command("set out --preset mine.yaml")


# ---- several rows of a picture


@pytest.mark.parametrize("layout", ["folder", "table"])
def test_the_first_of_repeated_rows_counts_where_a_preset_says_so(
    layout: str, tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set/images", "a.jpg", "b.jpg")
    text(tmp_path / "set/t.csv", "name,v", "a.jpg,1", "b.jpg,2", "a.jpg,3", "./a.jpg,4")
    rule = "files: t.csv, columns: {path: name}, dimensions: {valence: v}"
    form = f"layout: {layout}\nfind: t.csv\npictures: images\nlabel_folders: false\n"
    text(tmp_path / "first.yaml", f"{form}tables: [{{{rule}, repeated: first}}]")
    text(tmp_path / "join.yaml", f"{form}tables: [{{{rule}}}]")
    note = "2 rows of t.csv left out: of several rows of a picture the first one counts"
    assert note in command("set first --preset first.yaml")
    assert note not in command("set join --preset join.yaml")
    values = {
        out: {name: s["attributes"]["valence"] for name, s in samples(tmp_path / out).items()}
        for out in ("first", "join")
    }
    assert values == {
        "first": {"a.jpg": 1.0, "b.jpg": 2.0},
        "join": {"a.jpg": [1.0, 3.0, 4.0], "b.jpg": 2.0},
    }


@pytest.mark.parametrize("layout", ["folder", "table"])
def test_a_value_of_one_table_is_no_list_because_another_table_lacks_it(
    layout: str, tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set/images", "a.jpg", "b.jpg")
    text(tmp_path / "set/labels.csv", "name,mood,who", "a.jpg,calm,Ann", "a.jpg,calm,Bob", "b.jpg,upset,Ann")
    text(tmp_path / "set/values.csv", "name,v,note", "a.jpg,1,x", "b.jpg,2,")
    tables = (
        "tables: [{files: labels.csv, columns: {path: name, label: mood}}, "
        "{files: values.csv, columns: {path: name}, dimensions: {valence: v}}]"
    )
    form = f"layout: {layout}\nfind: labels.csv\npictures: images\nlabel_folders: false\n{tables}"
    text(tmp_path / "mine.yaml", f"labels: [calm, upset]\n{form}")
    assert "2 pictures, 2 labels, valence" in command("set out --preset mine.yaml")
    assert {name: (s["label"], s["attributes"]) for name, s in samples(tmp_path / "out").items()} == {
        "a.jpg": ("calm", {"who": ["Ann", "Bob"], "valence": 1.0, "note": "x"}),
        "b.jpg": ("upset", {"who": "Ann", "valence": 2.0}),
    }


# ---- captions, missing words and lists in tables that a preset describes

CSV = """,path,label,split,text,comment,mood,age
0,a.jpg,cat,train,a cat,one,calm,7
1,b.jpg,N/A,null,NA,two,null,NaN
2,c.jpg,dog,dev,"['a dog', 'it runs']",three,,8.5
3,a.jpg,cat,train,[applause] a cat,four,calm,7
"""


def facts(source: str, preset: str | None) -> tuple[list[Any], list[str]]:
    """What the records of a source state, and the notes."""
    opened = open_settings(PackSettings(source, None if preset else "table", preset=preset))
    records = list(open_source(opened.layout, opened.place, opened.options))
    stated = [(str(r.image).rpartition("/")[2], r.captions, r.label, r.split, r.attributes) for r in records]
    return stated, opened.options.findings.notes


@pytest.mark.parametrize("columns", ["", "columns: {path: path}", "columns: {path: path, label: label}"])
def test_a_described_csv_has_the_captions_and_missing_values_of_any_csv(columns: str, tmp_path: Path) -> None:
    text(tmp_path / "set/t.csv", CSV, end="")
    more = f", {columns}" if columns else ""
    text(tmp_path / "mine.yaml", f"layout: table\nfind: t.csv\ntables: [{{files: t.csv{more}}}]")
    plain, notes = facts(str(tmp_path / "set/t.csv"), None)
    assert plain[1:3] == [
        ("b.jpg", (), None, None, {"comment": "two", "mood": "null"}),
        ("c.jpg", ("a dog", "it runs"), "dog", "val", {"comment": "three", "age": 8.5}),
    ]
    described, its_notes = facts(str(tmp_path / "set"), str(tmp_path / "mine.yaml"))
    assert described == plain
    note = "1 tables with captions in 'text'; 'comment' became attributes (--column caption=NAME chooses)"
    chosen = note.replace("--column caption=NAME", "`columns: {caption: NAME}` in a preset")
    assert note in notes
    assert its_notes == [chosen if other == note else other for other in notes]
    assert "a column without a name was left out; name it in the header to keep it" in notes
    assert any(note.startswith("1 cell of the column 'label' with 'N/A': missing values") for note in notes)


def test_pictures_of_a_folder_have_the_same_values_from_a_described_csv(tmp_path: Path) -> None:
    text(tmp_path / "set/t.csv", CSV, end="")
    jpegs(tmp_path / "set/images", "a.jpg", "b.jpg", "c.jpg")
    form = (
        "find: t.csv\npictures: images\nlabel_folders: false\ntables: [{files: t.csv, columns: {path: path}}]"
    )
    text(tmp_path / "mine.yaml", form)
    records, notes = facts(str(tmp_path / "set"), str(tmp_path / "mine.yaml"))
    assert [record[:4] for record in records] == [
        ("a.jpg", ("a cat", "[applause] a cat"), "cat", "train"),
        ("b.jpg", (), None, None),
        ("c.jpg", ("a dog", "it runs"), "dog", "val"),
    ]
    assert any("'N/A': missing values" in note for note in notes)


def test_what_a_preset_says_of_a_word_goes_before_missing_values(tmp_path: Path) -> None:
    table = (
        "files: t.csv, columns: {path: path, label: label, caption: comment}, values: {label: {N/A: none}}"
    )
    text(
        tmp_path / "mine.yaml",
        f"layout: table\nfind: t.csv\ntables: [{{{table}, attributes: [text, label]}}]",
    )
    text(tmp_path / "set/t.csv", CSV, end="")
    records, notes = facts(str(tmp_path / "set"), str(tmp_path / "mine.yaml"))
    assert records[1] == ("b.jpg", ("two",), "none", None, {"text": "NA", "label": "N/A"})
    assert not any("caption" in note for note in notes)


def test_json_of_a_preset_keeps_words_as_texts_and_has_lists_of_captions(tmp_path: Path) -> None:
    text(tmp_path / "set/t.json", '[{"path": "a.jpg", "text": ["None", "a cat"], "label": "NA"}]')
    text(
        tmp_path / "mine.yaml",
        "layout: table\nfind: t.json\ntables: [{files: t.json, columns: {path: path}}]",
    )
    records, _ = facts(str(tmp_path / "set"), str(tmp_path / "mine.yaml"))
    assert records == [("a.jpg", ("None", "a cat"), "NA", None, {})]


# ---- the same picture under two labels


def test_fis_pictures_under_two_labels_are_packed_once_and_always_the_same_one(
    tmp_path: Path, command: Any
) -> None:
    SETS["FI"](tmp_path / "FI")
    folder = tmp_path / "FI/emotion_dataset"
    pairs = {f"awe/awe_{i:04d}.jpg": f"fear/fear_{i:04d}.jpg" for i in range(20)}
    for one, other in pairs.items():
        shutil.copy(folder / one, folder / other)
    for out in ("one", "two"):
        assert "160 pictures, 8 labels, 3 splits" in command(f"FI {out} --preset fi")
    rows = {out: pq.read_table(tmp_path / out / "rejected.parquet").to_pylist() for out in ("one", "two")}
    assert rows["one"] == rows["two"]
    packed = samples(tmp_path / "one")
    assert packed == samples(tmp_path / "two")
    order = ("train", "val", "test")
    for row in rows["one"]:
        name = row["source"]
        twin = pairs.get(name) or next(one for one, other in pairs.items() if other == name)
        kept = packed[twin]
        is_leak = row["reason"] == "leak"
        place = f" of split {kept['split']}" if is_leak else ""
        own = name.partition("/")[0]
        assert (
            row["detail"]
            == f"the same picture as {twin}{place}, which is labelled {kept['label']!r}, not {own!r}"
        )
        assert not is_leak or order.index(kept["split"]) > 0
    reasons = Counter(row["reason"] for row in rows["one"])
    assert reasons["leak"] + reasons["conflict"] == 20
    assert min(reasons["leak"], reasons["conflict"]) > 0
