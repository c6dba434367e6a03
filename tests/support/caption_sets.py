"""Miniatures of published caption sets (see `published_sets`). Captions are the published ones where a reader shows
them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from published_sets import jpeg, jpegs, published, table, text

CHILD = "1000268201_693b08cb0e.jpg"
DOGS = "1001773457_577c3a7d70.jpg"
OTHERS = ("1002674143_1b742ab4b8.jpg", "1003163366_44323f5815.jpg")
GIRL = "A child in a pink dress is climbing up a set of stairs in an entry way ."
STARING = "A black dog and a white dog with brown spots are staring at each other , in the street ."


# ---- Flickr8k


@published("Flickr8k")
def flickr8k(root: Path) -> None:
    """The original: `Flicker8k_Dataset` is spelt so; five captions belong to `….jpg.1`, which does not exist; a picture
    is in no list."""
    names = (CHILD, DOGS, *OTHERS)
    jpegs(root / "Flicker8k_Dataset", *names)
    inner = root / "Flickr8k_text"
    captions = {CHILD: [GIRL, "A girl going into a wooden building ."], DOGS: [STARING, ' A "big" dog .']}
    rows = [f"{name}#{i}\t{c}" for name in names for i, c in enumerate(captions.get(name, [f"{name[:4]} ."]))]
    rows += [f"2258277193_586949ec62.jpg.1#{i}\tPeople wait ." for i in range(5)]
    text(inner / "Flickr8k.token.txt", *rows)
    text(inner / "Flickr8k.lemma.token.txt", *(row.lower() for row in rows))
    text(inner / "Flickr_8k.trainImages.txt", CHILD)
    text(inner / "Flickr_8k.devImages.txt", DOGS)
    text(inner / "Flickr_8k.testImages.txt", OTHERS[0])
    text(inner / "readme.txt", "If you publish work based on this data set, please cite …")


@published("flickr8k-kaggle")
def flickr8k_kaggle(root: Path) -> None:
    """`captions.txt`, which is a CSV, beside `Images/`."""
    jpegs(root / "Images", CHILD, DOGS)
    table(
        root / "captions.txt",
        ["image", "caption"],
        [CHILD, GIRL],
        [CHILD, "A girl going into a wooden building ."],
        [DOGS, STARING],
    )


def flickr8k_captions_csv(root: Path) -> None:
    """The same as `captions.csv` with the number of the picture, in a folder that was doubled."""
    flickr8k_kaggle(root / "flickr8k")
    (root / "flickr8k/captions.txt").unlink()
    rows = [[CHILD, GIRL, 1], [CHILD, "A girl going into a wooden building .", 1], [DOGS, STARING, 2]]
    table(root / "flickr8k/captions.csv", ["image", "caption", "id"], *rows)


# ---- Flickr30k


@published("flickr30k_images")
def flickr30k(root: Path) -> None:
    """Kaggle's: columns with a leading blank, a folder inside a folder of the same name, and the broken row."""
    jpegs(root / "flickr30k_images", "1000092795.jpg", "2199200615.jpg")
    text(
        root / "results.csv",
        "image_name| comment_number| comment",
        "1000092795.jpg| 0| Two young guys with shaggy hair look at their hands while hanging out in the yard .",
        '1000092795.jpg| 1| Two "young" , White males are outside near many bushes .',
        "2199200615.jpg| 3| A brown and black dog is running through a leafy field .",
        "2199200615.jpg| 4   A dog runs across the grass .",
    )


@published("flickr30k-hf")
def flickr30k_hugging_face(root: Path) -> None:
    """`nlphuji/flickr30k`: a row for each picture, with JSON lists; the column `split` states the splits."""
    jpegs(root / "flickr30k-images", "1000092795.jpg", "10002456.jpg", "test_image.jpg")
    two = [
        "Two young guys with shaggy hair look at their hands while hanging out in the yard.",
        "Two young, White males are outside near many bushes.",
    ]
    table(
        root / "flickr_annotations_30k.csv",
        ["raw", "sentids", "split", "filename", "img_id"],
        [json.dumps(two), "[0, 1]", "train", "1000092795.jpg", 0],
        [json.dumps(['A man in "green".']), "[5]", "val", "10002456.jpg", 1],
        [json.dumps(["A red square.", "A tiny image."]), "[10, 11]", "test", "test_image.jpg", 42],
    )


def flickr30k_token(root: Path) -> None:
    jpegs(root / "flickr30k-images", "1000092795.jpg")
    text(
        root / "results_20130124.token",
        "1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands while hanging out in the yard .",
        "1000092795.jpg#1\tTwo young , White males are outside near many bushes .",
    )


# ---- Karpathy's splits


def _entry(number: int, name: str, split: str, *captions: str, **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": c.lower().strip(" .").split(), "raw": c, "imgid": number, "sentid": number * 5 + i}
        for i, c in enumerate(captions)
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    return {
        "sentids": ids,
        "imgid": number,
        "sentences": sentences,
        "split": split,
        "filename": name,
        **more,
    }


def karpathy(path: Path, dataset: str, *images: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "dataset": dataset}))


@published("coco-karpathy")
def coco_karpathy(root: Path) -> None:
    """Splits cross the folders: pictures of val2014 are train (`restval`), val and test."""
    names = [f"COCO_val2014_{number:012}.jpg" for number in (391895, 522418, 184613)]
    train = "COCO_train2014_000000318219.jpg"
    jpegs(root, *(f"val2014/{name}" for name in names), f"train2014/{train}")
    karpathy(
        root / "dataset_coco.json", "coco",
        _entry(0, names[0], "test", "A man with a red helmet on a small moped on a dirt road. ", "Man riding a bike",
               filepath="val2014", cocoid=391895),
        _entry(1, names[1], "val", "A woman cutting a cake.", filepath="val2014", cocoid=522418),
        _entry(2, names[2], "restval", "A child holding an umbrella.", filepath="val2014", cocoid=184613),
        _entry(3, train, "train", "A boy in front of a keyboard.", filepath="train2014", cocoid=318219),
    )  # fmt: skip


def flickr30k_karpathy(root: Path) -> None:
    """`dataset_flickr30k.json` beside Kaggle's `results.csv`, which has no splits."""
    flickr30k(root)
    yard = "Two young guys with shaggy hair look at their hands while hanging out in the yard."
    karpathy(
        root / "dataset_flickr30k.json",
        "flickr30k",
        _entry(0, "1000092795.jpg", "train", yard, "Two young, White males are outside."),
        _entry(1, "2199200615.jpg", "test", "A dog runs across the grass."),
    )


def flickr8k_karpathy(root: Path) -> None:
    jpegs(root / "Images", CHILD, DOGS)
    karpathy(
        root / "dataset_flickr8k.json",
        "flickr8k",
        _entry(0, CHILD, "train", GIRL),
        _entry(1, DOGS, "val", STARING),
    )


# ---- Conceptual Captions


@published("Train_GCC-training.tsv")
def cc3m(path: Path, url: str = "http://127.0.0.1:9") -> None:
    """Captions and URLs, without a header and without quoting."""
    text(
        path,
        f"a very typical bus station\t{url}/-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.jpg?imgmax=800",
        f'" a quote " said <person>\t{url}/3b1332/tumblr_500.jpg',
        f"none\t{url}/none.jpg",
        f"this picture is gone\t{url}/gone.jpg",
    )


def cc3m_pictures(root: Path) -> None:
    jpegs(root, "-IvRtNLNcG8o/TpFyrudaT6I/IMG_3422.jpg", "3b1332/tumblr_500.jpg", "none.jpg")


# ---- img2dataset


@published("img2dataset-files")
def img2dataset(root: Path) -> None:
    """`--output_format files`: numbers have gaps, failed downloads are only in the table, captions may be missing."""
    for key, caption in (("000000000", "a cat"), ("000000002", None), ("000010000", 'a "dog"')):
        folder = root / key[:5]
        jpeg(folder / f"{key}.jpg")
        row = {"url": f"https://x.org/{key}.jpg", "caption": caption, "similarity": 0.25}
        text(folder / f"{key}.json", json.dumps({**row, **_download(key)}, indent=4))
        (folder / f"{key}.txt").write_text(caption or "")
    for shard, keys in (("00000", ("000000000", "000000001", "000000002")), ("00001", ("000010000",))):
        rows = [{"url": f"https://x.org/{key}.jpg", "caption": "x", **_download(key)} for key in keys]
        for row in rows:
            if row["key"] == "000000001":
                row |= {"status": "failed_to_download", "error_message": "404", "width": None, "height": None}
        pq.write_table(pa.Table.from_pylist(rows), root / f"{shard}.parquet")
        stats = {"count": len(keys), "successes": len(keys), "failed_to_download": 0, "status_dict": {}}
        text(root / f"{shard}_stats.json", json.dumps(stats))


def _download(key: str) -> dict[str, Any]:
    return {
        "key": key, "status": "success", "error_message": None, "width": 48, "height": 32,
        "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "ab" * 32,
    }  # fmt: skip


# ---- Hugging Face


@published("beans")
def hugging_face_parquet(root: Path) -> None:
    """Splits in the names of the files; classes are numbers, whose names are in the schema."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["healthy", "bean_rust"], "_type": "ClassLabel"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("text", pa.string())], metadata=meta)
    files = {
        "train-00000-of-00002-3f5c1a2b4d6e7f80": [(0, 0), (1, 1)],
        "train-00001-of-00002-9a0b1c2d3e4f5061": [(2, 1)],
        "validation-00000-of-00001-0d49c5d7b8ac2ba4": [(3, 0)],
        "test-00000-of-00001-5061728394a5b6c7": [(4, -1)],
    }
    (root / "data").mkdir(parents=True)
    for name, rows in files.items():
        pictures = [
            {"bytes": jpeg(root.parent / f"tmp/{i}.jpg").read_bytes(), "path": f"{i}.jpg"} for i, _ in rows
        ]
        columns = {
            "image": pictures,
            "label": [label for _, label in rows],
            "text": [f"leaf {i}" for i, _ in rows],
        }
        pq.write_table(pa.table(columns, schema), root / f"data/{name}.parquet")
    text(root / "README.md", "---", "configs:", "---", "# beans")


@published("imagefolder")
def hugging_face_imagefolder(root: Path) -> None:
    """`datasets`' ImageFolder: splits and labels are folders."""
    for split in ("train", "validation", "test"):
        for label in ("cat", "dog"):
            jpegs(root / split / label, "0001.png", "0002.jpg")


CARD = """---
license: cc-by-4.0
configs:
- config_name: default
  data_files:
  - split: train
    path:
    - rows/a.csv
    - rows/b-*.csv
  - split: validation
    path: "held_out/**/*.csv"
  - split: hard
    path: missing/*.csv
---
# A set

Its card states which table is which split.
"""


def hugging_face_card(root: Path) -> None:
    """Splits in the YAML of the card, the "manual configuration" of the Hub; names of files do not state them."""
    names = {"rows/a": (0,), "rows/b-1": (1, 2), "rows/b-2": (3,), "held_out/x/c": (4,), "rows/unused": (5,)}
    for name, numbers in names.items():
        folder = root / name.rpartition("/")[0]
        jpegs(folder, *(f"{i}.jpg" for i in numbers))
        table(root / f"{name}.csv", ["file_name", "text"], *([f"{i}.jpg", f"caption {i}"] for i in numbers))
    (root / "README.md").write_text(CARD)


def hugging_face_metadata(root: Path) -> None:
    """Captions in a `metadata.jsonl` of each split; `evaluation` is one of the names of test."""
    for split in ("train", "evaluation"):
        jpegs(root / split, "0001.png", "0002.png")
        rows = [{"file_name": f"000{i}.png", "text": f"{split} {i}"} for i in (1, 2)]
        text(root / split / "metadata.jsonl", *map(json.dumps, rows))
