"""Miniatures of published sets of faces, and of ArtEmis (see `published_sets`)."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from published_sets import jpeg, jpegs, published, table, text

SIDE = 48


def grey_values(seed: int) -> list[int]:
    """48 x 48 grey values, row by row."""
    return [int(n) for n in np.random.RandomState(seed).randint(0, 256, SIDE * SIDE)]


def pixels(seed: int) -> str:
    return " ".join(map(str, grey_values(seed)))


# ---- FER2013 and FER+

ROWS = ((0, "Training"), (3, "Training"), (4, "PublicTest"), (5, "PublicTest"), (6, "PrivateTest"))
"""Class and usage of each row."""


@published("fer2013")
def fer2013(root: Path) -> None:
    rows = [f"{emotion},{pixels(i)},{usage}" for i, (emotion, usage) in enumerate(ROWS)]
    text(root / "fer2013.csv", "emotion,pixels,Usage", *rows)
    text(root / "README", "The data consists of 48x48 pixel grayscale images of faces.")


def icml_face_data(root: Path) -> None:
    """Kaggle's copy: names of columns have a leading blank, and their order is another."""
    rows = [f'{emotion},{usage},"{pixels(i)}"' for i, (emotion, usage) in enumerate(ROWS)]
    text(root / "archive/icml_face_data.csv", "emotion, Usage, pixels", *rows)


def fer2013_competition(root: Path) -> None:
    """Kaggle's `train.csv`, which has no column of splits, beside `test.csv`, which has no labels."""
    rows = [f'{emotion},"{pixels(i)}"' for i, (emotion, _) in enumerate(ROWS)]
    text(root / "train.csv", "emotion,pixels", *rows)
    text(root / "test.csv", "pixels", f'"{pixels(9)}"')


def fer2013_folders(root: Path) -> None:
    """Kaggle's folders, whose test has both `PublicTest_` and `PrivateTest_`."""
    jpegs(root, "train/happy/Training_3908.jpg", "train/neutral/Training_12.jpg")
    jpegs(root, "test/happy/PublicTest_77.jpg", "test/happy/PrivateTest_134207.jpg")


PLUS = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
VOTES = (
    "Training,fer0000000.png,4,0,0,1,3,2,0,0,0,0",
    "Training,fer0000001.png,6,0,1,1,0,0,0,0,2,0",
    "PublicTest,,0,0,0,0,0,0,0,0,0,10",
    "PublicTest,fer0000003.png,0,0,0,0,0,0,0,0,0,10",
    "PrivateTest,fer0010406.png,4,0,0,0,0,3,1,0,1,0",
)
"""The first three rows and the last one are real: the third is one of 173 without a name, the last has nine votes."""


@published("FERPlus")
def ferplus(root: Path) -> None:
    """`fer2013new.csv` has a row for each row of `fer2013.csv`, and no other key."""
    fer2013(root)
    text(root / "fer2013new.csv", PLUS, *VOTES)


def ferplus_folders(root: Path) -> None:
    """The pictures that the authors' script writes beside lists without a header."""
    folders = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}
    for usage, folder in folders.items():
        rows = []
        for row in VOTES:
            found, name, *votes = row.split(",")
            if found == usage and name:
                jpeg(root / "data" / folder / name, (SIDE, SIDE), "PNG")
                rows.append(f'{name},"(0, 0, 48, 48)",{",".join(votes)}')
        text(root / "data" / folder / "label.csv", *rows)


# ---- ArtEmis

GINOUX = "vincent-van-gogh_portrait-of-madame-ginoux-l-arlesienne-1890"
PORTRAIT = "peter-paul-rubens_portrait-of-a-man-1612"


@published("ArtEmis")
def artemis(root: Path) -> None:
    """The table names no extension; pictures are in WikiArt's folders of styles. Rows of a painting are apart."""
    jpegs(root / "wikiart", f"Post_Impressionism/{GINOUX}.jpg", f"Baroque/{PORTRAIT}.jpg")
    jpeg(root / f"wikiart/Realism/{GINOUX}.jpg", (64, 64))
    style, other = "Post_Impressionism", "Baroque"
    table(
        root / "artemis_dataset_release_v0.csv",
        ["art_style", "painting", "emotion", "utterance", "repetition"],
        [style, GINOUX, "something else", "She seems very happy being in the picture, and I want to know why.", 5],
        [other, PORTRAIT, "awe", "The detail of the collar is impressive", 2],
        [style, GINOUX, "sadness", "Her eyes are sad", 5],
        [style, GINOUX, "contentment", 'A "calm" face', 5],
        [other, PORTRAIT, "awe", "The lace is so fine", 2],
        [style, GINOUX, "sadness", "The colours are sombre", 5],
        [style, GINOUX, "something else", "Her eyes are sad", 5],
        ["Realism", GINOUX, "fear", "The same name in another style", 1],
        ["Realism", "josé-ferraz_caipira-1893", "amusement", "His name is mangled", 1],
    )  # fmt: skip


def artemis_preprocessed(root: Path) -> None:
    """`artemis_preprocessed.csv` of its authors' script: splits by painting, and `rest` for those with many utterances.
    Names are in decomposed form (NFD) in some copies."""
    artemis(root)
    names = [
        "art_style",
        "painting",
        "emotion",
        "utterance",
        "repetition",
        "split",
        "tokens",
        "utterance_spelled",
    ]
    names += ["tokens_len", "tokens_encoded", "emotion_label"]

    def row(style: str, painting: str, emotion: str, utterance: str, split: str) -> list[Any]:
        words = utterance.lower().split()
        return [
            style,
            painting,
            emotion,
            utterance,
            5,
            split,
            words,
            utterance.lower(),
            len(words),
            [1, 7, 2],
            3,
        ]

    folded = unicodedata.normalize("NFD", "josé-ferraz_caipira-1893")
    jpegs(root / "wikiart", f"Realism/{folded}.jpg")
    table(
        root / "preprocessed/artemis_preprocessed.csv",
        names,
        row("Post_Impressionism", GINOUX, "sadness", "Her eyes are sad", "train"),
        row("Baroque", PORTRAIT, "awe", "The lace is so fine", "val"),
        row("Post_Impressionism", GINOUX, "contentment", "A calm face", "train"),
        row("Realism", GINOUX, "fear", "The same name in another style", "rest"),
        row("Realism", unicodedata.normalize("NFC", folded), "amusement", "A farmer", "test"),
    )


# ---- RAF-DB


@published("RAF-DB")
def raf_db(root: Path) -> None:
    """The list is really called "patition"; it names pictures without `_aligned`, train_ with 5 digits, test_ 4."""
    names = {"train_00001": 5, "train_00002": 4, "test_0001": 1, "test_0002": 7}
    text(
        root / "basic/EmoLabel/list_patition_label.txt",
        *(f"{name}.jpg {number}" for name, number in names.items()),
    )
    for name in names:
        jpeg(root / f"basic/Image/aligned/{name}_aligned.jpg", (100, 100))
        jpeg(root / f"basic/Image/original/{name}.jpg", (160, 120))
    text(root / "basic/Annotation/manual/train_00001_manu_attri.txt", "0\t1\t2")


def raf_db_kaggle(root: Path) -> None:
    jpegs(root, "DATASET/train/5/train_00001_aligned.jpg", "DATASET/train/4/train_00002_aligned.jpg")
    jpegs(root, "DATASET/test/1/test_0001_aligned.jpg", "DATASET/test/7/test_0002_aligned.jpg")
    table(root / "train_labels.csv", ["image", "label"], ["train_00001_aligned.jpg", 5])


# ---- AffectNet

HAPPY = "689/737db2483489148d783ef278f43f486c0a97e140fc4b6b61b84363ca.jpg"
UPPER = "1/1957a923f84a1a3af2e82b91aa8c2dbbe06e8c3dafe77adc46e4a416.JPG"


@published("AffectNet")
def affectnet(root: Path) -> None:
    """Faces 8 to 10 have no expression and -2 for valence and arousal; one row names a picture that does not exist."""
    header = [
        *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height"),
        *("facial_landmarks", "expression", "valence", "arousal"),
    ]
    landmarks = ";".join(f"{n}.5" for n in range(136))
    jpegs(root / "Manually_Annotated_Images", HAPPY, UPPER, "12/0f3a.jpg", "12/0f3b.jpg", "12/0f3c.jpg")
    lists = root / "Manually_Annotated_file_lists"
    table(
        lists / "training.csv",
        header,
        [HAPPY, 134, 134, 899, 899, landmarks, 1, 0.785714, -0.055556],
        [UPPER, 30, 30, 201, 201, landmarks, 7, -0.44, 0.31],
        ["12/0f3a.jpg", 12, 8, 140, 140, landmarks, 10, -2, -2],
        ["12/0f3b.jpg", 12, 8, 140, 140, landmarks, 9, -2, -2],
        ["12/gone.jpg", 12, 8, 140, 140, landmarks, 0, 0, 0],
    )
    table(lists / "validation.csv", header, ["12/0f3c.jpg", 12, 8, 140, 140, landmarks, 0, -2, 0.5])


def affectnet_automatic(root: Path) -> None:
    """The other half of the set, which a network labelled: a table with the same columns, and pictures of its own."""
    affectnet(root)
    manual = root / "Manually_Annotated_file_lists/training.csv"
    header = manual.read_text().splitlines()[0].split(",")
    jpegs(root / "Automatically_Annotated_Images", "1/a0.jpg", "1/a1.jpg", "2/a2.jpg")
    table(
        root / "Automatically_Annotated_file_lists/automatically_annotated.csv",
        header,
        ["1/a0.jpg", 1, 2, 3, 4, "1;2", 1, 0.5, 0.25],
        ["1/a1.jpg", 1, 2, 3, 4, "1;2", 8, -2, -2],
        ["2/a2.jpg", 1, 2, 3, 4, "1;2", 0, -0.1, -2],
    )


def affectnet_folders(root: Path) -> None:
    """A re-release in folders of numbers."""
    jpegs(root, "train/0/1.jpg", "train/7/2.jpg", "val/3/3.jpg")


def affectnet_kaggle(root: Path) -> None:
    """`labels.csv` states other labels than the folders for some pictures."""
    jpegs(root, "anger/image0000006.jpg", "happy/image0000010.jpg")
    text(
        root / "labels.csv",
        ",pth,label,relFCs",
        "0,anger/image0000006.jpg,surprise,0.87",
        "1,happy/image0000010.jpg,happy,0.9",
    )


def affectnet_arrays(root: Path) -> None:
    """The release of 2020: texts in `.npy` files beside the pictures."""
    for folder, number, values in (
        ("train_set", 3, ("3", "0.43", "-0.1")),
        ("val_set", 14, ("0", "-0.5", "0")),
    ):
        jpeg(root / folder / f"images/{number}.jpg", (224, 224))
        (root / folder / "annotations").mkdir()
        for name, value in zip(("exp", "val", "aro"), values):
            np.save(root / folder / f"annotations/{number}_{name}.npy", np.array(value))
        np.save(root / folder / f"annotations/{number}_lnd.npy", np.zeros(136))
