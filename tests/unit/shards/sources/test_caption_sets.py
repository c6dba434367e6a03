"""Published caption sets and Hugging Face's and img2dataset's folders, packed by the commands of
shards/sources/README.md; captions and splits by the rules of public readers, written down by hand."""

import shutil
from pathlib import Path
from typing import Any

import caption_sets as sets
import pytest
from published_sets import jpegs, samples, table, text
from web import serve

from shards.sources import SourceOptions, open_source
from uniemox_dist.cli.main import run

CHILD, DOGS, GIRL, STARING = sets.CHILD, sets.DOGS, sets.GIRL, sets.STARING
WOODEN = "A girl going into a wooden building ."


# ---- Flickr8k


def test_flickr8k_has_captions_of_the_token_file_and_splits_of_the_lists(pack_set: Any) -> None:
    found = pack_set("Flickr8k")
    third, fourth = sets.OTHERS
    assert found.column("captions") == {
        CHILD: [GIRL, WOODEN],
        DOGS: [STARING, 'A "big" dog .'],
        third: ["1002 ."],
    }
    assert found.column("split") == {CHILD: "train", DOGS: "val", third: "test"}
    assert set(found.column("label").values()) == {""}
    lists = "Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt"
    assert found.refused == {
        "2258277193_586949ec62.jpg.1": (
            "unreadable",
            "Flickr8k.token.txt, line 7 names it, but there is no such file",
        ),
        fourth: ("annotation", f"none of {lists} names it"),
    }


@pytest.mark.parametrize(
    "doubled", ["Flickr8k_Dataset/Flicker8k_Dataset", "Flicker8k_Dataset/Flicker8k_Dataset"]
)
def test_flickr8k_is_found_in_folders_that_were_unpacked_twice(doubled: str, pack_set: Any) -> None:
    def write(root: Path) -> None:
        sets.flickr8k(root / "Flickr8k")
        (root / "Flickr8k/Flicker8k_Dataset").rename(root / "pictures")
        (root / "Flickr8k" / doubled).parent.mkdir()
        (root / "pictures").rename(root / "Flickr8k" / doubled)

    found = pack_set("Flickr8k", write)
    assert found.column("split") == {CHILD: "train", DOGS: "val", sets.OTHERS[0]: "test"}


@pytest.mark.parametrize("write", [None, sets.flickr8k_captions_csv])
def test_flickr8k_of_kaggle_is_a_csv_without_splits(write: Any, pack_set: Any) -> None:
    found = pack_set("flickr8k-kaggle", write)
    assert found.column("captions") == {CHILD: [GIRL, WOODEN], DOGS: [STARING]}
    assert set(found.column("split").values()) == {""}
    assert found.refused == {}


def test_karpathys_splits_of_flickr8k_go_first(pack_set: Any) -> None:
    def write(root: Path) -> None:
        sets.flickr8k_kaggle(root)
        sets.flickr8k_karpathy(root)

    found = pack_set("Flickr8k", write)
    assert found.column("split") == {CHILD: "train", DOGS: "val"}
    assert found.column("captions") == {CHILD: [GIRL], DOGS: [STARING]}


# ---- Flickr30k

YARD = "Two young guys with shaggy hair look at their hands while hanging out in the yard ."


def test_flickr30k_of_kaggle_has_the_caption_of_its_broken_row(pack_set: Any) -> None:
    found = pack_set("flickr30k_images")
    assert found.column("captions") == {
        "1000092795.jpg": [YARD, 'Two "young" , White males are outside near many bushes .'],
        "2199200615.jpg": [
            "A brown and black dog is running through a leafy field .",
            "A dog runs across the grass .",
        ],
    }
    assert found.refused == {}


def test_flickr30k_of_hugging_face_has_json_captions_and_a_column_of_splits(pack_set: Any) -> None:
    found = pack_set("flickr30k-hf")
    assert found.column("captions") == {
        "1000092795.jpg": [
            YARD.replace(" .", "."),
            "Two young, White males are outside near many bushes.",
        ],
        "10002456.jpg": ['A man in "green".'],
        "test_image.jpg": ["A red square.", "A tiny image."],
    }
    assert found.column("split") == {
        "1000092795.jpg": "train",
        "10002456.jpg": "val",
        "test_image.jpg": "test",
    }


def test_flickr30k_has_a_token_file(pack_set: Any) -> None:
    found = pack_set("flickr30k_images", sets.flickr30k_token)
    assert found.column("captions") == {
        "1000092795.jpg": [YARD, "Two young , White males are outside near many bushes ."]
    }


# ---- Karpathy's splits


def test_karpathys_restval_of_coco_is_train(pack_set: Any) -> None:
    found = pack_set("coco-karpathy")
    names = [f"val2014/COCO_val2014_{number:012}.jpg" for number in (391895, 522418, 184613)]
    train = "train2014/COCO_train2014_000000318219.jpg"
    assert found.column("split") == {
        names[0]: "test",
        names[1]: "val",
        names[2]: "train",
        train: "train",
    }
    assert found.samples[names[0]]["captions"] == [
        "A man with a red helmet on a small moped on a dirt road.",
        "Man riding a bike",
    ]
    assert found.samples[train]["attributes"] == {"cocoid": 318219}


def test_karpathys_splits_may_be_in_the_folder_of_their_archive(pack_set: Any) -> None:
    def write(root: Path) -> None:
        sets.coco_karpathy(root)
        (root / "caption_datasets").mkdir()
        (root / "dataset_coco.json").rename(root / "caption_datasets/dataset_coco.json")
        (root / "images").mkdir()
        for folder in ("val2014", "train2014"):
            (root / folder).rename(root / "images" / folder)

    found = pack_set("coco-karpathy", write)
    assert sorted(found.column("split").values()) == ["test", "train", "train", "val"]


def test_karpathys_splits_of_flickr30k_go_first(pack_set: Any) -> None:
    found = pack_set("flickr30k_images", sets.flickr30k_karpathy)
    assert found.column("split") == {"1000092795.jpg": "train", "2199200615.jpg": "test"}
    assert found.samples["2199200615.jpg"]["captions"] == ["A dog runs across the grass."]


# ---- Conceptual Captions


def test_cc3m_is_read_by_captions_and_urls(pack_set: Any, tmp_path: Path) -> None:
    sets.cc3m_pictures(tmp_path / "web")
    with serve(tmp_path / "web") as web:
        found = pack_set("Train_GCC-training.tsv", lambda path: sets.cc3m(path, web.url))
        bus, quote, none, gone = (
            f"{web.url}/{path}"
            for path in (
                "-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.jpg?imgmax=800",
                "3b1332/tumblr_500.jpg",
                "none.jpg",
                "gone.jpg",
            )
        )
    assert found.column("captions") == {
        bus: ["a very typical bus station"],
        quote: ['" a quote " said <person>'],
        none: ["none"],
    }
    assert found.refused[gone][0] == "unreadable"


def test_the_preset_cc3m_has_two_tables_as_splits_without_that_of_labels(
    pack_set: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.cc3m_pictures(tmp_path / "web")
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path / "web") as web:
        text(tmp_path / "cc3m/Train_GCC-training.tsv", f'"none\t{web.url}/none.jpg')
        text(tmp_path / "cc3m/Validation_GCC-1.1.0-Validation.tsv", f"a \t{web.url}/3b1332/tumblr_500.jpg")
        labels = f"none\t{web.url}/none.jpg\tdog,cat\t/m/0bt9lr,/m/01yrx\t0.9,0.8"
        text(tmp_path / "cc3m/Image_Labels_Subset_Train_GCC-Labels-training.tsv", labels)
        assert (
            run(["shards", "pack", "cc3m", "out", "--preset", "cc3m", "--persons", "none", "--workers", "0"])
            == 0
        )
    found = {
        name.rpartition("/")[2]: (sample["split"], sample["captions"])
        for name, sample in samples(tmp_path / "out").items()
    }
    assert found == {"none.jpg": ("train", ['"none']), "tumblr_500.jpg": ("val", ["a"])}


# ---- img2dataset


def test_img2dataset_folders_are_shards_and_no_labels(pack_set: Any) -> None:
    found = pack_set("img2dataset-files")
    assert found.column("captions") == {
        "00000/000000000.jpg": ["a cat"],
        "00000/000000002.jpg": [],
        "00001/000010000.jpg": ['a "dog"'],
    }
    assert set(found.column("label").values()) == {""}
    assert found.samples["00000/000000000.jpg"]["attributes"] == {
        "url": "https://x.org/000000000.jpg",
        "similarity": 0.25,
        "original_width": 640,
        "original_height": 480,
        "exif": "{}",
    }
    assert "not pictures: 5 .json, 3 .txt, 2 .parquet" in found.summary
    assert "several files" not in found.summary


# ---- Hugging Face


def test_parquet_files_state_splits_in_their_names_and_labels_in_their_schema(pack_set: Any) -> None:
    found = pack_set("beans")
    by_caption = {
        sample["captions"][0]: (sample["split"], sample["label"]) for sample in found.samples.values()
    }
    assert by_caption == {
        "leaf 0": ("train", "healthy"),
        "leaf 1": ("train", "bean_rust"),
        "leaf 2": ("train", "bean_rust"),
        "leaf 3": ("val", "healthy"),
        "leaf 4": ("test", ""),
    }


def test_the_folder_of_the_tables_and_a_converted_copy_are_the_same(pack_set: Any) -> None:
    def inner(root: Path) -> None:
        sets.hugging_face_parquet(root.parent / "repository")
        (root.parent / "repository/data").rename(root)

    def converted(root: Path) -> None:
        sets.hugging_face_parquet(root)
        for path in sorted((root / "data").iterdir()):
            split = path.name.partition("-")[0]
            number = len(list((root / "default" / split).glob("*")))
            (root / "default" / split).mkdir(parents=True, exist_ok=True)
            path.rename(root / f"default/{split}/{number:04}.parquet")
        (root / "data").rmdir()

    def described(found: Any) -> list[tuple[str, ...]]:
        return sorted((s["captions"][0], s["split"], s["label"]) for s in found.samples.values())

    first = described(pack_set("beans", inner))
    shutil.rmtree("beans")
    shutil.rmtree("data")
    assert described(pack_set("beans", converted)) == first
    assert first[0] == ("leaf 0", "train", "healthy")


def test_numbered_tables_with_another_word_are_another_split(tmp_path: Path) -> None:
    sets.hugging_face_parquet(tmp_path / "a")
    name = "test-00000-of-00001-5061728394a5b6c7.parquet"
    (tmp_path / "a/data" / name).rename(tmp_path / "a/data/robust-00000-of-00001.parquet")
    records = open_source("table", str(tmp_path / "a"), SourceOptions())
    assert [record.split for record in records] == ["robust", "train", "train", "train", "val"]


def test_several_configurations_are_named(tmp_path: Path, pack_error: Any) -> None:
    sets.hugging_face_parquet(tmp_path / "a")
    shutil.copytree(tmp_path / "a/data", tmp_path / "a/large")
    (tmp_path / "a/data").rename(tmp_path / "a/small")
    line = pack_error("a out")
    assert "SOURCE=a: has tables of several configurations (large, small); give one of these folders" in line
    assert run(["shards", "pack", "a/small", "out", "--persons", "none", "--workers", "0"]) == 0


def test_an_imagefolder_has_splits_and_labels_in_its_folders(pack_set: Any) -> None:
    found = pack_set("imagefolder")
    assert {(sample["split"], sample["label"]) for sample in found.samples.values()} == {
        (split, label) for split in ("train", "val", "test") for label in ("cat", "dog")
    }
    assert len(found.samples) == 12


def test_an_imagefolder_has_captions_in_metadata_and_evaluation_is_test(pack_set: Any) -> None:
    found = pack_set("imagefolder", sets.hugging_face_metadata)
    assert {(sample["split"], *sample["captions"]) for sample in found.samples.values()} == {
        ("train", "train 1"), ("train", "train 2"), ("test", "evaluation 1"), ("test", "evaluation 2"),
    }  # fmt: skip


# ---- sets that lack something


def test_what_a_set_lacks_is_named(tmp_path: Path, pack_error: Any) -> None:
    sets.flickr8k(tmp_path / "a")
    (tmp_path / "a/Flickr8k_text/Flickr_8k.devImages.txt").unlink()
    assert "SOURCE=a: lacks Flickr8k_text/Flickr_8k.devImages.txt" in pack_error("a out --preset flickr8k")
    jpegs(tmp_path / "b/Images", CHILD)
    line = pack_error("b out --preset flickr8k")
    assert "needs dataset_flickr8k.json or " in line
    assert "it holds Images" in line
    table(tmp_path / "c/captions.txt", ["image", "caption"], [CHILD, GIRL])
    line = pack_error("c out --preset flickr8k")
    assert "nothing to pack, all 1 records were refused" in line
    assert "No such file" in line


def test_another_sets_preset_names_what_it_needs(tmp_path: Path, pack_error: Any) -> None:
    sets.coco_karpathy(tmp_path / "a")
    assert "--preset flickr30k needs dataset_flickr30k.json or" in pack_error("a out --preset flickr30k")
    table(tmp_path / "b/results.csv", ["path", "score"], ["a.jpg", 1])
    jpegs(tmp_path / "b", "a.jpg")
    assert "results.csv: has no rows" in pack_error("b out --preset flickr30k")
    text(tmp_path / "c/dataset_coco.json", '{"annotations": []}')
    assert "has no list under 'images'" in pack_error("c out --preset coco-karpathy")
