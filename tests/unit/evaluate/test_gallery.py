"""The gallery of held-out pictures: a map, neighbours, answers, attention."""

import base64
import io

import numpy as np
import torch
from handmade import config_of
from PIL import Image

from uniemox_dist.evaluate.gallery import (
    class_attention,
    find_neighbours,
    make_heat_map,
    project,
    select_answers,
    thumbnail,
)
from uniemox_dist.models.student import Student

SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def test_a_map_keeps_clusters_apart_and_lies_between_0_and_1() -> None:
    random = np.random.RandomState(0)
    features = np.concatenate([c + 0.1 * random.randn(20, 8) for c in 5 * np.eye(3, 8)])
    at = project(features)
    assert at.min() == 0.0
    assert at.max() == 1.0
    centres = at.reshape(3, 20, 2).mean(1)
    spread = at.reshape(3, 20, 2).std(1).max()
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 5 * spread
    assert project(np.ones((3, 4))).tolist() == [[0, 0]] * 3


def test_neighbours_are_the_nearest_others() -> None:
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    found = {row["picture"]: [n["picture"] for n in row["nearest"]] for row in find_neighbours(features)}
    assert found[0] == [1, 3, 2]
    assert found[2] == [3, 1, 0]


def test_answers_are_sorted_into_right_and_wrong_by_how_sure_they_are() -> None:
    logits = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0], [2.0, 0.0]])
    found = select_answers(logits, ["awe", "awe", "joy", None], ["awe", "joy"])
    assert found["accuracy"] == round(2 / 3, 4)
    assert [row["picture"] for row in found["right"]] == [2, 0]
    assert [(row["picture"], row["answer"]) for row in found["wrong"]] == [(1, "joy")]
    assert found["right"][1]["probability"] == round(1 / (1 + np.exp(-3)), 4)


def test_attention_is_that_of_the_class_token_in_the_last_block() -> None:
    config = config_of({**SHAPE, **DECODER})
    torch.manual_seed(0)
    student = Student(config.model, config.loss, 12).eval()
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = class_attention(student, pictures)
    assert found is not None
    block = student.encoder.blocks[-1]
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        block.attn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        student.encode(pictures)
        q, k, _ = block.attn.qkv(seen[0]).view(2, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
        share = (q @ k.transpose(-1, -2) / 4).softmax(-1)[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(found, (share / share.sum(1, keepdim=True)).view(2, 4, 4))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))
    for text, side in ((thumbnail(pictures[0], 40), 40), (make_heat_map(pictures[0], found[0]), 128)):
        assert Image.open(io.BytesIO(base64.b64decode(text))).size == (side, side)
