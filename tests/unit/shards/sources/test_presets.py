"""Presets of users, the options that replace one, and sets that lack something or are others: lines and exit codes."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_sets import README, SETS, jpegs, refusals, samples, table, text

from shards.sources.presets import load_presets, make_preset
from uniemox_dist.core.errors import UserError


def error(command: Any, line: str) -> str:
    code, _, err = command(line)
    assert code == 2
    assert not Path("out").exists()
    assert err.count("\n") == 1, err
    return str(err)


# ---- a user's file


MINE = """
labels: [calm, upset]
synonyms: {0: calm, 1: upset}
dimension_ranges: {valence: [-1, 1]}
forms:
  - layout: table
    find: facts/list.tsv
    pictures: [photos, pictures]
    tables:
      - files: facts/list.tsv
        header: [name, mood, v, x, y, w, h, who]
        columns: {path: "{name}.jpg", label: mood}
        patterns: {name: '^(?P<year>[0-9]{4})_'}
        dimensions: {valence: v}
        persons: {box: [x, y, w, h], form: size, unit: fractions}
        attributes: [year, who]
"""


def test_a_file_states_a_set_of_ones_own(tmp_path: Path, command: Any) -> None:
    text(tmp_path / "mine.yaml", MINE)
    jpegs(tmp_path / "set", "Pictures/1999_a.jpg", "Pictures/2001_b.jpg")
    text(
        tmp_path / "set/facts/list.tsv",
        "1999_a\t0\t-0.5\t0.25\t0.5\t0.25\t0.5\tMum",
        "1999_a\t1\t\t0\t0\t0.5\t0.5\t",
        "2001_b\t1\t1\t0\t0\t1\t1\tDad",
        "x_c\t1\t1\t0\t0\t1\t1\tDad",
        "1999_d\t1\t1.5\t0\t0\t1\t1\tDad",
        "1999_e\t1\t1",
    )
    code, out, err = command("set out --preset mine.yaml")
    assert code == 0, err
    assert "found: 2 pictures, 1 label, 3 persons with 2 labels and valence" in out
    found = samples(tmp_path / "out")
    both = found["1999_a.jpg"]
    assert both["persons"] == [
        {"box": [0.0, 0.0, 0.5, 0.5], "score": 1.0, "labels": {"label": "upset", "year": 1999}},
        {
            "box": [0.25, 0.5, 0.5, 1.0],
            "score": 1.0,
            "labels": {"label": "calm", "valence": -0.5, "who": "Mum", "year": 1999},
        },
    ]
    assert (both["label"], both["attributes"]) == ("", {})
    assert refusals(tmp_path / "out") == {
        "facts/list.tsv, line 4": (
            "annotation",
            "the column 'name' holds 'x_c', which does not match ^(?P<year>[0-9]{4})_",
        ),
        "1999_d.jpg": ("annotation", "persons.0.valence: 1.5 is beyond -1 to 1"),
        "facts/list.tsv, line 6": ("annotation", "has 3 values for 8 columns"),
    }


def test_numbers_of_labels_have_their_names_with_a_fraction_of_zero_too(tmp_path: Path, command: Any) -> None:
    form = "{layout: table, tables: [{files: t.csv, columns: {path: name, label: mood}, values: VALUES}]}"
    form = form.replace("VALUES", "{label: {0: calm, 1: upset}}")
    text(tmp_path / "mine.yaml", f"labels: [calm, upset]\nforms: [{form}]")
    jpegs(tmp_path / "set", "a.jpg", "b.jpg")
    text(tmp_path / "set/t.csv", "name,mood", "a.jpg,0.0", "b.jpg,1")
    code, _, err = command("set out --preset mine.yaml")
    assert code == 0, err
    found = samples(tmp_path / "out")
    assert {name: sample["label"] for name, sample in found.items()} == {"a.jpg": "calm", "b.jpg": "upset"}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("labels: [a, b]\npicture: x", "picture: unknown key; did you mean pictures?"),
        ("labels: 7", "labels=7: input should be a valid tuple"),
        ("labels: [a\nsplit:", "is not valid YAML"),
        ("", "holds no fields; give `labels:`"),
        ("- a", "holds no fields; give `labels:`"),
        ("labels: [a]\nname: '(?P<label>['", "name: '(?P<label>[' is not a regular expression: "),
        ("labels: [a]\nname: '([a-z]+)'", "its named groups may be label, split and group"),
        ("labels: [a]\nsynonyms: {A2: b}", "synonyms.A2='b': is none of labels: a"),
        ("labels: [a, ' ']", "labels.1: ' ' is no label; give a text on one line"),
        ('labels: ["a\\nb"]', "labels.0: 'a\\nb' is no label; give a text on one line"),
        ("labels: [a, A]", "labels: 'a' and 'A' are the same, because case is ignored; keep one"),
        ("labels: [a, b]\nsynonyms: {b: a}", "synonyms.b='a': is a label itself; leave it out"),
        ("labels: [a, b]\nsynonyms: {x: a, X: b}", "synonyms.X='b': the spelling means 'a', too"),
        ("lables: [a]", "lables: unknown key; did you mean tables or labels?"),
        ("labels: [a]\npictures: [../x]", "pictures.0: '../x' leads out of the set's folder"),
        (
            "labels: [a]\ntables: [{files: /etc/x}]",
            "tables.0.files.0: '/etc/x' leads out of the set's folder",
        ),
        ("labels: [a]\ntables: [{files: x, heeder: [b]}]", "did you mean tables.0.header?"),
        (
            "labels: [a]\nname: '(?P<label>a{99999999999})'",
            "is not a regular expression: the repetition number",
        ),
        pytest.param(
            f"labels: [a]\nname: '(?P<label>{'(' * 5000}{')' * 5000})'",
            "is not a regular expression: maximum recursion",
            id="deep",
        ),
        ("labels: [a]\nname: '(.'", "name: '(.' is not a regular expression: "),
        ("labels: [a]\nsplit: {train: 0}", "split.train=0: input should be greater than 0"),
        ("labels: [a]\nlayout: csv", "layout='csv': input should be"),
        ("labels: [a]\ntables: [{files: x, delimiter: ab}]", "delimiter='ab': give one character"),
        ("labels: [a]\ntables: [{files: x, line: '.*'}]", "has no named group"),
        ("labels: [a]\ntables: [{files: x, persons: {box: [a, b]}}]", "persons.box: names 2 columns"),
        (
            "labels: [a]\ndimension_ranges: {valence: [9, 1]}",
            "dimension_ranges.valence=[9, 1]: give the lower",
        ),
        ("labels: [a]\ntables: [{columns: {path: x}}]", "tables: one states no files"),
        (
            "labels: [a]\ntables: [{files: x, columns: {pth: x}}]",
            "tables.0.columns.pth: unknown key; valid are path, key, caption, label, split or image",
        ),
        ("labels: [a]\narrays: {label: a.npy}", "arrays.label='a.npy': lacks {stem}"),
        ("labels: [a]\narrays: {lable: '{stem}.npy'}", "arrays.lable: unknown key; valid are label, "),
        ("labels: [a]\nlayout: coco\ntables: [{files: x}]", "tables: layout coco reads its own"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_field_and_fix(
    content: str, wanted: str, tmp_path: Path, command: Any
) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    jpegs(tmp_path / "set", "a/1.jpg")
    line = error(command, "set out --preset mine.yaml")
    assert line.startswith("uniemox: error: --preset=mine.yaml: ")
    assert wanted in line


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path, command: Any) -> None:
    (tmp_path / "mine.yaml").write_text("splits: [a]\nlabels: [a]\nsplit: {train: 0}\nforms: [{fnid: x}]\n")
    jpegs(tmp_path / "set", "a/1.jpg")
    code, _, err = command("set out --preset mine.yaml")
    assert code == 2
    assert [line.removeprefix("uniemox: error: --preset=mine.yaml: ") for line in err.splitlines()] == [
        "splits: unknown key; did you mean split?",
        "split.train=0: input should be greater than 0",
        "forms.0.fnid: unknown key; did you mean forms.0.find?",
    ]


def test_a_set_of_tables_is_found_by_them(tmp_path: Path, command: Any) -> None:
    (tmp_path / "mine.yaml").write_text("layout: table\ntables: [{files: facts/t.csv}]\n")
    jpegs(tmp_path / "set", "below/1.jpg", "other/2.jpg")
    table(tmp_path / "set/below/facts/t.csv", ["path", "label"], ["1.jpg", "calm"])
    code, out, err = command("set out --preset mine.yaml")
    assert code == 0, err
    assert "found in set/below: 1 picture, 1 label" in out


def test_labels_may_be_numbers_and_lose_outer_spaces(tmp_path: Path, command: Any) -> None:
    (tmp_path / "mine.yaml").write_text("labels: [0, ' 1 ']\nsynonyms: {zero: 0}\n")
    jpegs(tmp_path / "set", "zero/1.jpg", "1/2.jpg")
    assert command("set out --preset mine.yaml")[0] == 0
    found = {name: sample["label"] for name, sample in samples(tmp_path / "out").items()}
    assert found == {"zero/1.jpg": "0", "1/2.jpg": "1"}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "a/1.jpg")
    assert "--preset=no.yaml: cannot be read (No such file" in error(command, "set out --preset no.yaml")


def test_the_manifest_keeps_a_file(tmp_path: Path, command: Any) -> None:
    (tmp_path / "mine.yaml").write_text("labels: [b, a]\n")
    jpegs(tmp_path / "set", "a/1.jpg", "b/1.jpg")
    assert command("set out --preset mine.yaml")[0] == 0
    manifest = (tmp_path / "out/manifest.json").read_text()
    assert '"preset"' in manifest
    assert '"mine.yaml"' in manifest


# ---- sets that are not what the preset says


def test_another_sets_preset_names_the_labels_and_the_nearest(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "Happines/1.jpg", "Angry/1.jpg", "bored/1.jpg")
    line = error(command, "set out --preset heco")
    assert (
        "none of its labels is one of the preset's: it has 'Angry', 'Happines', 'bored'; the preset has"
        in line
    )
    assert "nearest: 'Angry': Anger, 'Happines': Happiness" in line


def test_one_unknown_label_among_many_is_refused_and_counted(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "anger/1.jpg", "joy/1.jpg", "joyy/1.jpg", "joyy/2.jpg")
    code, out, _ = command("set out --preset ube")
    assert code == 0
    assert "4 records = 2 packed + 2 refused" in out
    reason, detail = refusals(tmp_path / "out")["joyy/1.jpg"]
    assert (reason, detail[-18:]) == ("label", "the nearest is joy")


def test_a_set_without_its_table_or_pictures_says_what_is_missing(tmp_path: Path, command: Any) -> None:
    header = ["Image", "xmin", "ymin", "xmax", "ymax", "Category", "Valence", "Arousal", "Dominance"]
    table(tmp_path / "set/Labels/HECO_Labels.csv", header, ["1.jpg", 0, 0, 9, 9, "Fear", 1, 1, 1])
    assert "has no folder Data or Images with the pictures" in error(command, "set out --preset heco")
    jpegs(tmp_path / "set", "Images/2.jpg")
    line = error(command, "set out --preset heco")
    assert "nothing to pack, all 1 records were refused; the first: 1.jpg: " in line
    assert "No such file or directory: " in line
    jpegs(tmp_path / "set", "elsewhere/1.jpg")
    assert command("set out --preset heco --pictures elsewhere")[0] == 0


def test_a_table_of_another_set_names_the_column_that_is_missing(tmp_path: Path, command: Any) -> None:
    table(tmp_path / "set/Labels/HECO_Labels.csv", ["Image", "xmin", "Category"], ["1.jpg", 0, "Fear"])
    jpegs(tmp_path / "set", "Data/1.jpg")
    line = error(command, "set out --preset heco")
    assert "has no column 'Valence', which the preset names; its columns are Image, xmin, Category" in line


def test_a_table_of_a_set_stands_for_the_set(tmp_path: Path, command: Any) -> None:
    SETS["HECO"](tmp_path / "set")
    assert command("set/Labels/HECO_Labels.csv out --preset heco")[0] == 0
    assert sorted(samples(tmp_path / "out")) == ["HECO_0001.png", "HECO_0002.png", "HECO_0003.png"]
    table(
        tmp_path / "captions/captions.txt",
        ["image", "caption"],
        ["1.jpg", "A child ."],
        ["1.jpg", "A girl ."],
    )
    jpegs(tmp_path / "captions", "Images/1.jpg")
    assert command("captions/captions.txt more --preset flickr8k")[0] == 0
    assert samples(tmp_path / "more")["1.jpg"]["captions"] == ["A child .", "A girl ."]


def test_a_folder_set_may_lack_its_optional_table_and_says_so(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "images/joy/1.jpg", "images/fear/1.jpg")
    code, out, _ = command("set out --preset emotion6")
    assert code == 0
    assert "without ground_truth.txt, which SOURCE does not have" in out


def test_values_beyond_their_range_and_shares_that_do_not_sum_to_one_refuse_their_picture(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "set", *(f"images/joy/{i}.jpg" for i in range(4)))
    labels = ("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral")
    header = ["[image_filename]", "[valence]", "[arousal]", *(f"[prob. {label}]" for label in labels)]
    rows = [
        ["joy/0.jpg", "9", "1", "0", "0", "0", "1", "0", "0", "0"],
        ["joy/1.jpg", "9.5", "1", "0", "0", "0", "1", "0", "0", "0"],
        ["joy/2.jpg", "9", "1", "0", "0", "0", "0.7", "0", "0", "0.2"],
        ["joy/3.jpg", "9", "x", "0", "0", "0", "1", "0", "0", "0"],
        ["joy/4.jpg", "9", "1", "0", "0", "0", "1", "0", "0", "0"],
    ]
    text(tmp_path / "set/ground_truth.txt", *map("\t".join, [header, *rows]))
    assert command("set out --preset emotion6")[0] == 0
    assert list(samples(tmp_path / "out")) == ["joy/0.jpg"]
    found = {name: detail for name, (_, detail) in refusals(tmp_path / "out").items()}
    assert found["joy/1.jpg"] == "valence: 9.5 is beyond 1 to 9"
    assert found["joy/2.jpg"].startswith("distribution: its shares sum to 0.9, not to 1")
    assert found["joy/3.jpg"] == "arousal: 'x' is not a number"
    assert found["joy/4.jpg"] == "ground_truth.txt, line 6 names it, but there is no such file"


def test_persons_are_clipped_at_the_edge_and_refused_beyond_it(tmp_path: Path, command: Any) -> None:
    header = ["Image", "xmin", "ymin", "xmax", "ymax", "Category", "Valence", "Arousal", "Dominance"]
    vad = [5, 5, 5]
    table(
        tmp_path / "set/Labels/HECO_Labels.csv", header,
        ["1.jpg", -10, 16, 24, 99, "Fear", *vad],
        ["1.jpg", 48, 0, 60, 32, "Joyless", *vad],
        ["2.jpg", 48, 0, 60, 32, "Fear", *vad],
        ["3.jpg", 10, 0, 5, 32, "Fear", *vad],
        ["4.jpg", 0, 0, 9, 9, "Fear", *vad],
        ["4.jpg", 48, 0, 60, 32, "Anger", *vad],
    )  # fmt: skip
    jpegs(tmp_path / "set", *(f"Data/{i}.jpg" for i in range(1, 5)))
    assert command("set out --preset heco")[0] == 0
    found = samples(tmp_path / "out")["4.jpg"]
    assert [person["box"] for person in found["persons"]] == [[0.0, 0.0, 0.1875, 0.28125]]
    details = {name: detail for name, (_, detail) in refusals(tmp_path / "out").items()}
    assert details["1.jpg"].startswith("label 'Joyless' is not one of")
    assert details["2.jpg"] == "no annotated person's box is inside the picture"
    assert details["Labels/HECO_Labels.csv, line 5"] == "the box (10, 0, 5, 32) has no corners in order"


def test_two_folders_that_look_like_the_set_are_named(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "one/joy/1.jpg", "two/joy/1.jpg")
    assert "has 2 folders that look like --preset ube (set/one, set/two)" in error(
        command, "set out --preset ube"
    )


def test_a_set_is_found_below_doubled_folders(tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "UnBiasedEmo/UnBiasedEmo/images/joy/bing/1.jpg", "__MACOSX/joy/1.jpg")
    code, out, _ = command("set out --preset ube")
    assert code == 0
    assert "found in set/UnBiasedEmo/UnBiasedEmo/images: 1 picture, 1 label" in out


# ---- options


def test_columns_delimiter_and_pictures_describe_a_table_without_a_header(
    tmp_path: Path, command: Any
) -> None:
    jpegs(tmp_path / "photos", "a.jpg", "b.jpg")
    text(tmp_path / "tables/list.txt", 'the "a"\ta.jpg', "b and more\tb.jpg", "b again\tb.jpg")
    line = "tables/list.txt out --columns caption,path --delimiter tab --pictures ../photos"
    code, _, err = command(line)
    assert code == 0, err
    assert [sample["captions"] for sample in samples(tmp_path / "out").values()] in (
        [['the "a"'], ["b and more", "b again"]],
        [["b and more", "b again"], ['the "a"']],
    )


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("set out --columns a,a", "--columns=a,a: give different names"),
        ("set out --delimiter ab", "--delimiter=ab: give one character, tab, or space"),
        ("set out --layout folder --pictures set", "--pictures: --layout folder reads no tables"),
        ("set/t.csv out --pictures none", "--pictures=none: set/none is no folder"),
        ("set out --preset heco --columns a,b", "--columns and --delimiter: a preset states them"),
    ],
)
def test_options_without_effect_are_refused(line: str, wanted: str, tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", "a/1.jpg")
    table(tmp_path / "set/t.csv", ["path"], ["a/1.jpg"])
    assert wanted in error(command, line)


def test_the_document_lists_all_shipped_presets() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall("`([a-z0-9-]+)`", row.split("|")[1])}
    assert set(load_presets()) <= listed


def test_all_shipped_presets_are_legal() -> None:
    assert {"emo8", "fi", "ube", "emotion6", "caer-s", "heco"} <= set(load_presets())
    with pytest.raises(UserError, match="here: forms=3: input should be"):
        make_preset({"labels": ["a"], "forms": 3}, "here")


# ---- EMOTIC as arrays


def test_an_array_that_is_no_picture_is_refused_and_pickles_are_never_loaded(
    tmp_path: Path, command: Any
) -> None:
    SETS["archive"](tmp_path / "set")
    arrays = tmp_path / "set/img_arrs"
    np.save(arrays / "img_arr_train_0.npy", np.array([{"run": "me"}], object), allow_pickle=True)
    np.save(arrays / "img_arr_val_0.npy", np.zeros((24, 24, 3), np.float32))
    (arrays / "img_arr_test_0.npy").unlink()
    assert command("set out --preset emotic")[0] == 0
    assert list(samples(tmp_path / "out")) == ["img_arr_extra_train_0.npy"]
    found = refusals(tmp_path / "out")
    assert found["img_arr_train_0.npy"] == (
        "corrupt", "img_arr_train_0.npy: not an array: holds pickled objects, which are not loaded",
    )  # fmt: skip
    assert found["img_arr_val_0.npy"] == (
        "format", "img_arr_val_0.npy: float32 of 24 x 24 x 3; height x width x 3 in uint8 is expected",
    )  # fmt: skip
    assert found["img_arr_test_0.npy"][0] == "unreadable"
    shutil.rmtree(arrays)
    shutil.rmtree(tmp_path / "out")
    assert "lacks img_arrs/, the pictures of annot_arrs_" in error(command, "set out --preset emotic")
