"""Trains the demo's teacher, a small CLIP, on the train split of the shipped table, from random weights.

Augmentation of pictures: random backgrounds, affine crops, hue, saturation, grey and erasing; of captions: dropped and
reordered tags. Soft targets come from shared tags, and the subgroup is an auxiliary target. The output is a folder in
open_clip's local-dir layout in fp16, and a table of retrieval on the test split beside trivial baselines.

    python tools/train_demo_teacher.py --out uniemox_dist/teacher/demo_teacher
"""

import copy
import io
import json
import math
import random
import re
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from shards.pictures.decode import decode_picture
from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.files import require_local
from uniemox_dist.data.views import decode_tensor, resize_whole
from uniemox_dist.evaluate.baselines import colour_histogram, small_pixels
from uniemox_dist.evaluate.intervals import Bootstrap
from uniemox_dist.evaluate.metrics import distinct_captions, retrieval_ranks, unit
from uniemox_dist.evaluate.probes import ridge
from uniemox_dist.teacher.identity import CONFIG, WEIGHTS
from uniemox_dist.teacher.model import Teacher

SIZE = 80
MEAN, STD = 0.5, 0.25
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "timm_model_name": "test_byobnet",  # the best of the small networks that train in minutes
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_drop": 0.1,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
}
PREPROCESS = {"size": [SIZE, SIZE], "mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic"}
# Luma and two chroma axes (YIQ): hue turns the chroma plane, saturation scales it.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def read_table(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads train and test rows."""
    rows = pq.read_table(path).to_pylist()
    return [r for r in rows if r["split"] == "train"], [r for r in rows if r["split"] == "test"]


def premultiplied(data: bytes, size: int) -> Tensor:
    """Decodes an RGBA picture to 4×size×size in 0…1, colours times alpha, so that resizing leaves no dark rims."""
    rgba = (
        torch.from_numpy(
            np.asarray(Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]).convert("RGBA")).copy()
        ).permute(2, 0, 1)
        / 255
    )
    rgba = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    return F.interpolate(rgba[None], size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def uniform(n: int, low: float, high: float) -> Tensor:
    """Returns n random numbers between two bounds."""
    return torch.rand(n) * (high - low) + low


def augment(x_B4HW: Tensor) -> Tensor:
    """Augments premultiplied pictures (affine, colour, background, erasing) and normalises them."""
    B = len(x_B4HW)
    zoom, aspect = torch.exp(uniform(B, -0.29, 0.3)), torch.exp(uniform(B, -0.2, 0.2))
    angle, mirror = 0.2 * torch.randn(B), torch.where(torch.rand(B) < 0.5, -1.0, 1.0)
    sx, sy, room = zoom * aspect, zoom / aspect, 0.15 + (1 - zoom).abs() * 0.5
    row_x = torch.stack([angle.cos() * sx * mirror, -angle.sin() * sy, uniform(B, -1, 1) * room], 1)
    row_y = torch.stack([angle.sin() * sx * mirror, angle.cos() * sy, uniform(B, -1, 1) * room], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [B, 4, SIZE, SIZE], align_corners=False)
    x = F.grid_sample(x_B4HW, grid, align_corners=False)
    rgb, alpha = x[:, :3], x[:, 3:]
    hue = torch.where(torch.rand(B) < 0.3, torch.randn(B) * 0.5, torch.randn(B) * 0.08)
    saturation = torch.where(torch.rand(B) < 0.1, torch.zeros(B), torch.exp(0.25 * torch.randn(B)))
    turn = torch.zeros(B, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = hue.cos() * saturation
    turn[:, 1, 2], turn[:, 2, 1] = -hue.sin() * saturation, hue.sin() * saturation
    rgb = torch.einsum("bij,bjhw->bihw", torch.linalg.inv(YIQ) @ turn @ YIQ, rgb)
    rgb = rgb * torch.exp(0.15 * torch.randn(B, 1, 1, 1)) + 0.05 * torch.randn(B, 1, 1, 1) * alpha
    pictures = (rgb + background(B) * (1 - alpha)).clamp(0, 1)
    return (erase(pictures) - MEAN) / STD


def background(B: int) -> Tensor:
    """Returns random backgrounds: white, one colour, a gradient, soft blobs, or noise."""
    kind = torch.rand(B)[:, None, None, None]
    plain = torch.rand(B, 3, 1, 1).expand(B, 3, SIZE, SIZE)
    gradient = F.interpolate(torch.rand(B, 3, 2, 2), size=(SIZE, SIZE), mode="bilinear", align_corners=True)
    blobs = F.interpolate(torch.rand(B, 3, 6, 6), size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    noise = plain + 0.15 * torch.randn(B, 3, SIZE, SIZE)
    chosen = torch.where(
        kind < 0.55, plain, torch.where(kind < 0.7, gradient, torch.where(kind < 0.85, blobs, noise))
    )
    return torch.where(kind < 0.4, torch.ones(()), chosen)


def erase(x_B3HW: Tensor) -> Tensor:
    """Covers a square of a third of the pictures with one colour."""
    B, axis = len(x_B3HW), torch.linspace(0, 1, SIZE)
    half = torch.where(torch.rand(B) < 0.3, uniform(B, 0.08, 0.2), torch.zeros(B))[:, None]
    y, x = (((axis - torch.rand(B, 1)).abs() < half) for _ in range(2))
    return torch.where((y[:, :, None] & x[:, None, :])[:, None], torch.rand(B, 3, 1, 1), x_B3HW)


def shorten(caption: str, rng: random.Random) -> str:
    """Keeps some of the tags in random order, or the caption as it is."""
    name, _, tags = caption.rpartition(": ")
    if not name or rng.random() < 0.2:
        return caption
    kept = rng.sample(tags.split(", "), rng.randint(0, len(tags.split(", "))))
    if kept and rng.random() < 0.15:
        return ", ".join(kept)
    return f"{name}: {', '.join(sorted(kept) if rng.random() < 0.5 else kept)}" if kept else name


def shared_words(captions: list[str]) -> Tensor:
    """Returns cosines of captions as bags of words weighted by rarity, n×n."""
    bags = [set(re.findall(r"[\w'’-]+", caption.lower())) for caption in captions]
    counts = Counter(word for bag in bags for word in bag)
    words = {word: i for i, word in enumerate(sorted(w for w in counts if counts[w] > 1))}
    x = torch.zeros(len(bags), len(words))
    for i, bag in enumerate(bags):
        for word in bag & words.keys():
            x[i, words[word]] = math.log(len(bags) / counts[word])
    x = F.normalize(x + 1e-9, dim=1)
    return x @ x.T


def targets(similarity_BB: Tensor) -> Tensor:
    """Returns soft targets: 0.7 for the pair, 0.1 spread evenly, 0.2 by shared words."""
    B = len(similarity_BB)
    soft = torch.softmax(similarity_BB / 0.15 - 1e9 * torch.eye(B), 1)
    return 0.7 * torch.eye(B) + 0.1 / B + 0.2 * soft


def train(rows: list[dict[str, Any]], steps: int, batch: int, peak_lr: float, seed: int) -> Any:
    """Trains a CLIP; returns the moving average of its weights."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model: Any = open_clip.CLIP(**MODEL)
    model.logit_scale.data.fill_(math.log(1 / 0.07))
    model.visual.to(memory_format=torch.channels_last)
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    pictures = torch.stack([premultiplied(r["image"], int(SIZE * 1.25)) for r in rows])
    captions = [r["caption"] for r in rows]
    similarity = shared_words(captions)
    groups = sorted({r["subgroup"] for r in rows})
    group_n = torch.tensor([groups.index(r["subgroup"]) for r in rows])
    head = nn.Linear(MODEL["embed_dim"], len(groups))
    parameters = [*model.parameters(), *head.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, *plain], betas=(0.9, 0.98))
    average = copy.deepcopy(model)
    queue: list[int] = []
    bar = tqdm(range(steps), desc="training the teacher")
    for step in bar:
        warm, progress = min(1, (step + 1) / (0.1 * steps)), step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
        if len(queue) < batch:
            queue = rng.sample(range(len(rows)), len(rows))
        chosen, queue = torch.tensor(queue[:batch]), queue[batch:]
        x = augment(pictures[chosen])
        # Mixup blends pictures and their targets.
        share = torch.where(torch.rand(batch) < 0.5, uniform(batch, 0.5, 1.0), torch.ones(batch))[:, None]
        other = torch.randperm(batch)
        x = share[:, :, None, None] * x + (1 - share[:, :, None, None]) * x[other]
        v = model.encode_image(x.contiguous(memory_format=torch.channels_last), normalize=True)
        t = model.encode_text(tokenize([shorten(captions[i], rng) for i in chosen.tolist()]), normalize=True)
        logits = model.logit_scale.exp().clamp(max=50) * v @ t.T
        goal = targets(similarity[chosen][:, chosen])
        goal = share * goal + (1 - share) * goal[other]
        back = goal.T / goal.sum(0)[:, None]
        loss = (
            -(goal * logits.log_softmax(1)).sum(1).mean() / 2
            - (back * logits.T.log_softmax(1)).sum(1).mean() / 2
        )
        kind = F.one_hot(group_n[chosen], len(groups)).float()
        loss = loss + 0.7 * F.cross_entropy(
            head(v * 8), share * kind + (1 - share) * kind[other], label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        blend = 1 - min(0.99, (1 + step) / (10 + step))
        for kept, new in zip(average.state_dict().values(), model.state_dict().values()):
            kept.lerp_(new, blend) if kept.is_floating_point() else kept.copy_(new)
    # Words that occur in no caption would keep random vectors, which are noise in held-out captions.
    unseen = torch.ones(MODEL["text_cfg"]["vocab_size"], dtype=torch.bool)
    unseen[tokenize(captions + [", ".join(reversed(c.split(", "))) for c in captions]).unique()] = False
    average.token_embedding.weight.data[unseen] = 0
    return average.eval()


def save(model: Any, out: Path) -> None:
    """Writes the two files of the local-dir folder; other files in `out` (its README) stay."""
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": {**PREPROCESS, "resize_mode": "squash"}}
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    half = {n: (x.half() if x.is_floating_point() else x).contiguous() for n, x in model.state_dict().items()}
    save_file(half, temporary / WEIGHTS)
    out.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (temporary / name).chmod(0o644)
        (temporary / name).replace(out / name)
    temporary.rmdir()


def measure(
    folder: Path, train_rows: list[dict[str, Any]], test_rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measures held-out retrieval of the saved teacher and of baselines, with intervals over pictures and families."""
    teacher = Teacher(TeacherConfig(name=f"local-dir:{folder}"))

    def embed_rows(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        whites = [decode_picture(r["image"]) for r in rows]
        scenes = torch.stack([resize_whole(decode_tensor(r["image"]), SIZE) for r in rows])
        return {
            "teacher": torch.cat([teacher.embed_pictures(piece) for piece in scenes.split(64)]).numpy(),
            "texts": teacher.embed_texts([r["caption"] for r in rows]).numpy(),
            "colour histogram": np.stack([colour_histogram(w) for w in whites]),
            "24x24 pixels": np.stack([small_pixels(w) for w in whites]),
        }

    known, held = embed_rows(train_rows), embed_rows(test_rows)
    families, captions = [r["family"] for r in train_rows], [r["caption"] for r in test_rows]
    vectors_of = {"teacher": held["teacher"]}
    for row in ("colour histogram", "24x24 pixels"):
        vectors_of[row] = unit(ridge(known[row], known["texts"], families, held[row]))
    texts, own, _ = distinct_captions([[caption] for caption in captions])
    texts_TE = teacher.embed_texts(texts).numpy()
    table = []
    for row, vectors in vectors_of.items():
        line: dict[str, Any] = {"row": row}
        for k in (1, 10):
            hits = (retrieval_ranks(vectors, texts_TE, own) < k).astype(np.float64)
            line[f"r{k}"] = float(hits.mean())
            for unit_name, clusters in (
                ("pictures", captions),
                ("families", [r["family"] for r in test_rows]),
            ):
                line[f"r{k}_{unit_name}"] = Bootstrap(clusters).mean(hits)
        table.append(line)
    return table


@click.command()
@click.option("--table", type=click.Path(path_type=Path, exists=True), help="Default: the shipped table.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", type=click.IntRange(0), default=600, show_default=True, help="0: only measure OUT.")
@click.option("--batch", type=click.IntRange(2), default=128, show_default=True)
@click.option("--lr", type=float, default=4e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the table there too.")
def main(
    table: Path | None, out: Path, steps: int, batch: int, lr: float, seed: int, json_file: Path | None
) -> None:
    """Trains the demo's teacher and measures it on held-out pictures."""
    require_local(out, "--out")
    require_local(json_file or "", "--json")
    train_rows, test_rows = read_table(
        table or Path(str(resources.files("shards") / "demo/fluent_emoji.parquet"))
    )
    if steps:
        save(train(train_rows, steps, batch, lr, seed), out)
    result = measure(out, train_rows, test_rows)
    click.echo(f"{'row':20s} R@1     R@10    95 % over pictures   95 % over families")
    for line in result:
        spans = "   ".join("[{:.3f}, {:.3f}]".format(*line[f"r10_{u}"]) for u in ("pictures", "families"))
        click.echo(f"{line['row']:20s} {line['r1']:.3f}   {line['r10']:.3f}   {spans}")
    click.echo(f"chance               {1 / len(test_rows):.3f}   {10 / len(test_rows):.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
