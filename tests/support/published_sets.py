"""Miniatures of published emotion sets, and the means for those of others (`caption_sets`, `face_sets`): real JPEGs in
the folders, with the names, columns and oddities of the published form.

`shards/sources/README.md` names for each set the reader from which its form was taken. `write(SOURCE)` writes the
miniature for which that document has the command.
"""

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from doc_lines import command_lines
from PIL import Image

README = Path(__file__).parents[2] / "shards/sources/README.md"
SETS: dict[str, Callable[[Path], None]] = {}
"""SOURCE of a command in the document -> a function that writes this set into an empty folder."""


def published(source: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers the writer of a set under the SOURCE of its command."""

    def register(write: Callable[[Path], None]) -> Callable[[Path], None]:
        SETS[source] = write
        return write

    return register


def command_of(source: str) -> list[str]:
    """The words of the document's command for a set, without `uniemox`."""
    [words] = [words for words in pack_commands() if words[2] == source]
    return words


def pack_commands() -> list[list[str]]:
    """All commands of the document that pack a set."""
    lines = command_lines(README.read_text(encoding="utf-8"))
    return [words for words in lines if words[:2] == ["shards", "pack"]]


def jpeg(path: Path, size: tuple[int, int] = (48, 32), format: str = "JPEG") -> Path:
    """A picture of noise that differs from those of all other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (
        np.random.RandomState(zlib.crc32(str(path).encode()))
        .randint(0, 255, (size[1] // 4, size[0] // 4, 3))
        .astype(np.uint8)
    )
    Image.fromarray(pixels).resize(size).save(path, format)
    return path


def jpegs(root: Path, *names: str) -> None:
    for name in names:
        jpeg(root / name)


def text(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def table(path: Path, header: Sequence[str], *rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def refusals(out: Path) -> dict[str, tuple[str, str]]:
    """The refused records of a data set by their names in the source: reason and detail."""
    rejected = out / "rejected.parquet"
    rows = pq.read_table(rejected).to_pylist() if rejected.is_file() else []
    return {row["source"]: (row["reason"], row["detail"]) for row in rows}


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """What the tars of a pack hold: the name in the source -> the sample's JSON, with its split."""
    found: dict[str, dict[str, Any]] = {}
    for tar in sorted(out.rglob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".json"):
                    content = json.load(members.extractfile(member))  # type: ignore[arg-type]
                    for name in ("attributes", "persons", "label_distribution"):
                        content[name] = json.loads(content[name])
                    content["captions"] = [caption for caption in content["captions"] if caption]
                    split = "" if tar.parent == out else tar.parent.name
                    assert content["source"] not in found
                    found[content["source"]] = {**content, "split": split}
    return found


# ---- the seven


@published("UnBiasedEmo")
def unbiased_emo(root: Path) -> None:
    for label in ("anger", "fear", "joy", "love", "sadness", "surprise"):
        for source in ("bing", "google"):
            jpegs(root, *(f"images/{label}/{source}/{i}.jpg" for i in range(10)))
    text(root / "README.txt", "UnBiasedEmo")


@published("HECO")
def heco(root: Path) -> None:
    columns = "Image,xmin,ymin,xmax,ymax,Category,Label_SA,Label_CA,Valence,Arousal,Dominance"
    for i in range(1, 5):
        jpeg(root / f"Data/HECO_{i:04d}.png", format="PNG")
    table(
        root / "Labels/HECO_Labels.csv",
        columns.split(","),
        ["HECO_0001.png", 0, 0, 12.0000001, 16, "Peace", "Extremely-Sa", "Mildly-Ca", 6, 3, 5],
        ["HECO_0001.png", 12, 8, 48, 32, "Happinesst", "Neutral", "Highly-Ca", 8, 6, 5],
        ["HECO_0002.png", 6, 8, 60, 40, "Anger", "SlightlyN-Sa", "Neutral", 2, 8, 10],
        ["HECO_0003.png", 0, 0, 24, 32, "Fear", "Neutral", "Neutral", 3, 7, 2],
        ["HECO_0003.png", 24, 0, 48, 32, "Fear", "Neutral", "Neutral", 2, 8, 1],
        ["HECO_0004.png", 0, 0, 24, 32, "Sadness", "Neutral", "Neutral", 11, 4, 3],
    )


@published("CAER-S")
def caer_s(root: Path) -> None:
    for label in ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"):
        jpegs(root, *(f"train/{label}/{i:04d}.png" for i in range(1, 3)))
        jpegs(root, *(f"test/{label}/{i:04d}.png" for i in range(1, 4)))


@published("Emotion6")
def emotion6(root: Path) -> None:
    labels = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
    probabilities = "\t".join(f"[prob. {label}]" for label in (*labels, "neutral"))
    rows = []
    for number, label in enumerate(labels):
        for i in range(1, 11):
            jpegs(root, f"images/{label}/{i}.jpg")
            shares = [0.0] * 7
            shares[number], shares[6] = 0.733333, 0.266667
            if (label, i) == ("joy", 3):
                shares[number], shares[0] = 0.4, 0.333333
            rows.append(
                "\t".join([f"{label}/{i}.jpg", f"{number + 1.5}", "4.2", *(f"{s:g}" for s in shares)])
            )
    text(
        root / "ground_truth.txt",
        f"[image_filename]\t[valence]\t[arousal]\t{probabilities}",
        *rows,
        end="\r\n",
    )


@published("FI")
def fi(root: Path) -> None:
    for label in ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness"):
        jpegs(root, *(f"emotion_dataset/{label}/{label}_{i:04d}.jpg" for i in range(20)))


@published("you_imemo")
def fi_votes(root: Path) -> None:
    url = "http://farm4.staticflickr.com/3776/{}.jpg"
    text(
        root / "agg/amusement_result.csv",
        f"0,{url.format('123_abc')},1,4",
        f"1,{url.format('124_abc')},3,2",  # most said no
        f"2,{url.format('125_abc')},0,5",
    )
    text(root / "agg/fear_result.csv", f"0,{url.format('125_abc')},2,3", f"1,{url.format('126_abc')},2,3")
    jpegs(
        root, "agg/imgs/amusement/123_abc.jpg", "agg/imgs/amusement/124_abc.jpg", "agg/imgs/fear/126_abc.jpg"
    )
    for label in ("amusement", "fear"):  # a picture under two labels is the same file twice
        Image.new("RGB", (48, 32), (9, 90, 200)).save(root / f"agg/imgs/{label}/125_abc.jpg")


@published("EMOTIC")
def emotic(root: Path) -> None:
    header = "Index,Folder,Filename,Image Size,BBox,Categorical_Labels,Continuous_Labels,Gender,Age"
    row = '0,mscoco/images,{}.jpg,"[48, 32]","[0, 0, 24, 32]","{}","[5, 3, 9]",Male,Adult'
    both = [
        row.format("COCO_1", "['Disconnection', 'Doubt/Confusion']"),
        '1,mscoco\\images,COCO_1.jpg,"[48, 32]","[0, 0, 48, 32]","[\'Peace\']","[6.5, 4.0, 7.0]",Female,Kid',
    ]
    for split, rows in {
        "train": both,
        "val": [row.format("COCO_2", "['Fear']")],
        "test": [row.format("COCO_3", "['Disquietment']")],
    }.items():
        text(root / f"emotic_pre/{split}.csv", header, "", *rows, end="\r\n")
    jpegs(root, *(f"emotic/emotic/mscoco/images/COCO_{i}.jpg" for i in (1, 2, 3)))


@published("archive")
def emotic_arrays(root: Path) -> None:
    categories = (
        "Peace,Affection,Esteem,Anticipation,Engagement,Confidence,Happiness,Pleasure,Excitement,Surprise,Sympathy,"
        "Doubt/Confusion,Disconnection,Fatigue,Embarrassment,Yearning,Disapproval,Aversion,Annoyance,Anger,Sensitivity,"
        "Sadness,Disquietment,Fear,Pain,Suffering"
    )
    header = (
        "Folder,Filename,Width,Height,Age,Gender,Valence,Arousal,Dominance,"
        f"{categories},X_min,Y_min,X_max,Y_max,Arr_name,Crop_name"
    )

    def row(array: str, chosen: tuple[str, ...], box: str) -> str:
        marks = ",".join("1" if name in chosen else "0" for name in categories.split(","))
        return f"mscoco/images,a.jpg,640,320,Adult,Male,5,3,9,{marks},{box},{array}.npy,crop_{array}.npy"

    for split in ("train", "extra_train", "val", "test"):
        rows = [row(f"img_arr_{split}_0", ("Peace", "Doubt/Confusion"), "0,0,320,320")]
        if split == "train":
            rows.append(row("img_arr_train_0", ("Fear",), "320,160,640,320"))
        text(root / f"annots_arrs/annot_arrs_{split}.csv", "\ufeff" + header, *rows)
        (root / "img_arrs").mkdir(exist_ok=True)
        for array in ("img_arr", "crop_img_arr"):
            pixels = (
                np.random.RandomState(len(split) + len(array)).randint(0, 256, (24, 24, 3)).astype(np.uint8)
            )
            np.save(root / f"img_arrs/{array}_{split}_0.npy", pixels)


@published("EmoSet-118K-hf")
def emoset_parquet(root: Path) -> None:
    labels = ["sadness", "amusement", "fear", "awe", "anger", "contentment", "disgust", "excitement"]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": labels}}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, parts in {"train": 2, "val": 1, "test": 1}.items():
        for part in range(parts):
            rows = []
            for i, label in enumerate(labels):
                file = io.BytesIO()
                seed = 100 * part + 10 * i + len(split)
                pixels = np.random.RandomState(seed).randint(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                image = {"bytes": file.getvalue(), "path": None}
                rows.append({"image": image, "image_id": f"{label}_{seed}", "emotion": label, "label": i})
            columns = pa.Table.from_pylist(rows).replace_schema_metadata(meta)
            (root / "data").mkdir(parents=True, exist_ok=True)
            pq.write_table(columns, root / f"data/{split}-{part:05d}-of-{parts:05d}.parquet")


@published("Emo8")
def emo8(root: Path) -> None:
    for label in ("Amusement", "Awe", "Contentment", "Excitement", "Anger", "Disgust", "Fear", "Sadness"):
        for split, count in {"Train": 3, "Val": 1, "Test": 1}.items():
            jpegs(root, *(f"{split}/{label}/{i}.jpg" for i in range(count)))


# ---- further emotion sets


@published("ArtPhoto")
def artphoto(root: Path) -> None:
    for label in ("amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sad"):
        jpegs(root, *(f"testImages_artphoto/{label}_{i:04d}.jpg" for i in range(1, 3)))


@published("Abstract")
def abstract(root: Path) -> None:
    names = "'','Amusement','Anger','Awe','Content','Disgust','Excitement','Fear','Sad'"
    text(
        root / "testImages_abstract/ABSTRACT_groundTruth.csv",
        names,
        "'abstract_0001.jpg',1,1,1,2,0,6,3,0",
        "'abstract_0002.jpg',2,0,3,5,0,5,1,0",
        "'abstract_0003.jpg',0,0,0,0,0,0,0,0",
    )
    jpegs(root, *(f"testImages_abstract/abstract_000{i}.jpg" for i in (1, 2, 3)))


@published("EmotionROI")
def emotionroi(root: Path) -> None:
    for label in ("anger", "disgust", "fear", "joy", "sadness", "surprise"):
        jpegs(
            root / "EmotionROI",
            *(f"{kind}/{label}/{i}.jpg" for kind in ("images", "ground_truth") for i in (1, 2)),
        )
    lists = root / "EmotionROI/training_testing_split"
    text(
        lists / "training.txt",
        *(f"{label}/1.jpg" for label in ("anger", "disgust", "fear", "joy", "sadness")),
    )
    text(
        lists / "testing.txt", *(f"{label}/2.jpg" for label in ("anger", "disgust", "fear", "joy", "sadness"))
    )


@published("Emotion-6")
def panda_emotion_6(root: Path) -> None:
    for label in ("anger", "fear", "joy", "love", "sadness", "surprise"):
        jpegs(root, *(f"images/{label}/query/query/{i}.jpg" for i in range(10)))
    jpegs(root, "images/anger/digust/1.jpg")


@published("WEBEmo")
def webemo(root: Path) -> None:
    url = "https://as2.ftcdn.net/jpg/01/00/{}.jpg"
    text(root / "train25.txt", f"{url.format('a')} 5", f"{url.format('b')} 11", end="\n")
    text(root / "test25.txt", f"{url.format('c')} 1")
    text(
        root / "category.txt",
        "# Three level emotion hierarchy.",
        "labels=[('affection', 'love', '+')]",
        end="\r\n",
    )
    jpegs(root, "train/5/a.jpg", "train/11/b.jpg", "test/1/c.jpg")


@published("Twitter_PCNN")
def twitter_i(root: Path) -> None:
    text(root / "three_agree.txt", "288_463_Bm.jpg 0", "335_466_Bj.jpg 1", "400_1_B.jpg 1")
    text(root / "four_agree.txt", "288_463_Bm.jpg 0", "335_466_Bj.jpg 1")
    text(root / "five_agree.txt", "335_466_Bj.jpg 1")
    votes = ["288_463_Bm.jpg,5,4,1", "335_466_Bj.jpg,5,0,5", "400_1_B.jpg,5,2,3"]
    text(root / "amt_result.csv", "image,total,negative,positive", *votes)
    jpegs(root, *(f"Agg_AMT_Candidates/{name}.jpg" for name in ("288_463_Bm", "335_466_Bj", "400_1_B")))


def write_votes(root: Path, blank: str) -> None:
    names = "images-name Amusement Awe Contentment Excitement Anger Disgust Fear Sadness"
    rows = (
        "1.jpg 0 1 8 2 0 0 0 0",
        "2.jpg 3 0 1 5 0 0 0 2",
        "3.jpg 0 4 4 3 0 0 0 0",
        "4.jpg 0 0 0 0 0 0 0 0",
    )
    text(root / "ground_truth.txt", *(f"{row}{blank}" for row in (names, *rows)))
    jpegs(root, *(f"images/{i}.jpg" for i in range(1, 5)))


@published("Flickr_LDL")
def flickr_ldl(root: Path) -> None:
    write_votes(root, "")


@published("Twitter_LDL")
def twitter_ldl(root: Path) -> None:
    write_votes(root, " ")


@published("OASIS")
def oasis(root: Path) -> None:
    names = "Theme,Category,Source,Valence_mean,Valence_SD,Valence_N,Arousal_mean,Arousal_SD,Arousal_N"
    text(
        root / "OASIS.csv",
        f"\ufeff,{names}",
        "I1,Acorns 1,Object,Pixabay,4.68627451,0.954202712,102,2.346534653,1.602720459,101",
        'I18,"Angry face 4 ","Person","Flickr/Jan Tik",2.49,1.14,102,3.87,1.85,101',
        end="\r",
    )
    jpegs(root, "images/Acorns 1.jpg", "images/Angry face 4.jpg")


@published("GAPED")
def gaped(root: Path) -> None:
    at = root / "GAPED"
    text(
        at / "A_with SD.txt",
        "\tValence\t(SD)\tArousal\t(SD)",
        "",
        "A001.bmp\t27.4507\t(18.3312)\t59.1026\t(22.0145)",
    )
    text(at / "Sn_with SD.txt", "\tValence\t(SD)\tArousal\t(SD)", "Sn001.jpg\t\t35.1\t(20.2)\t61.0\t\t(19.9)")
    jpeg(at / "A/A001.bmp", format="BMP")
    jpeg(at / "Sn/Sn001.bmp", format="BMP")


@published("IAPS")
def iaps(root: Path) -> None:
    names = "desc IAPS valmn valsd aromn arosd dom1mn dom1sd dom2mn dom2sd set"
    rows = (
        "Snake 1050 3.46 2.15 6.87 1.68 3.08 2.18 . . 2",
        "BurnVictim 2055.1 2.03 1.47 4.90 2.46 . . 3.8 2.2 12",
        "Snake 1050 4.46 2.15 5.87 1.68 3.48 2.18 . . 20",  # rated twice
    )
    text(
        root / "IAPS Tech Report/AllSubjects_1-20.txt",
        "International Affective Picture System", "", "All subjects", "", "", "",
        *(row.replace(" ", "\t") for row in (names, *rows)),
    )  # fmt: skip
    jpegs(root, "IAPS 1-20 Images/1050.jpg", "IAPS 1-20 Images/2055.1.JPG")
