"""The results that are shown for sample pictures: masks, reconstructions, nearest texts, and the contact sheet."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import TINY_MODEL
from torch.nn import functional as F

from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order
from uniemox_dist.models.patches import patchify
from uniemox_dist.models.student import Student
from uniemox_dist.train.samples import contact_sheet
from uniemox_dist.train.samples.pictures import (
    GREY,
    collect_facts,
    encode_png,
    find_nearest,
    inspect_samples,
    render_markdown,
    save,
)
from uniemox_dist.train.samples.selection import Shown, Texts

TINY = (*TINY_MODEL, "model.depth=1")
CAPTIONS = ("a red cat", "a blue dog", "")
WORDS = Texts(("a red cat", "a blue dog", "a street"), torch.eye(3, 8), torch.eye(3, 8)[[0, 0, 2]])


def make(*settings: str) -> tuple[Config, Student, Shown]:
    """A student with random weights, and three pictures of noise, the second with a person in its left half."""
    config = load_config("demo", [*TINY, *settings])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config.model, config.loss, 8 if config.loss.needs_teacher else None).eval()
        pixels = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    side = 32 // config.model.patch_size
    on = torch.zeros(3, side, side, dtype=torch.bool)
    on[1, :, : side // 2] = True
    boxes = (None, (0.0, 0.0, 0.5, 1.0), None)
    texts = WORDS if config.loss.needs_teacher else None
    return config, student, Shown("d", ("k0", "k1", "k2"), CAPTIONS, *pixels, boxes, on.flatten(1), texts)


def seen_by(student: Student, shown: Shown):  # type: ignore[no-untyped-def]
    return inspect_samples(student, shown, 0, torch.device("cpu"))


@pytest.mark.parametrize("mask", ["random", "block", "person"])
def test_masked_pictures_use_the_runs_kind_of_mask_in_both_views(mask: str) -> None:
    config, student, shown = make(f"model.mask={mask}", "loss.person_reconstruction=true")
    seen = seen_by(student, shown)
    assert len(seen.lines) == 2
    slots = torch.arange(3)
    orders = (
        choose_patch_order(config.model, slots, SCENE_VIEW, 0, shown.on_person_BN),
        choose_patch_order(config.model, slots, PERSON_VIEW, 0),
    )
    for line, order, pixels in zip(seen.lines, orders, (shown.scene_B3HW, shown.person_B3HW)):
        truth, masked, filled = (patchify(part, config.model.patch_size) for part in line.unbind(1))
        torch.testing.assert_close(truth, patchify(pixels.float() / 255, config.model.patch_size))
        hidden = torch.zeros(3, config.model.patches, dtype=torch.bool)
        hidden.scatter_(1, order[:, config.model.visible :], True)
        assert bool((masked[hidden] == GREY).all())
        torch.testing.assert_close(masked[~hidden], truth[~hidden])
        torch.testing.assert_close(filled[~hidden], truth[~hidden])
        predicted = student.reconstruct(pixels, order).clamp(0, 1)
        torch.testing.assert_close(filled.gather(1, order[:, config.model.visible :, None].expand(-1, -1, truth.shape[2])), predicted)  # fmt: skip  # noqa: E501
        error = (filled - truth).square().sum((1, 2)) / hidden.sum(1) / truth.shape[2]
        if line is seen.lines[0]:
            assert seen.errors == pytest.approx(error.tolist(), rel=1e-5)
    if mask == "person":
        hidden_on = (seen.lines[0][1, 1] == GREY).all(0)[:, :16].float().mean()
        assert hidden_on == pytest.approx(6 / 8)  # half of the 12 masked patches, of 8 on the person


def test_nearest_texts_are_those_of_the_unmasked_embedding() -> None:
    _, student, shown = make()
    seen = seen_by(student, shown)
    fused = student.embed(shown.scene_B3HW, shown.person_B3HW)[1]
    assert fused is not None
    cosines = F.normalize(fused, dim=1)[:, :3]
    assert seen.student is not None
    for i, found in enumerate(seen.student):
        order = cosines[i].argsort(descending=True).tolist()
        assert [text for text, _ in found.texts] == [WORDS.texts[n] for n in order]
        assert [c for _, c in found.texts] == pytest.approx(cosines[i][order].tolist(), abs=1e-6)
    assert seen.student[2].own is None  # no caption
    assert seen.teacher is not None
    assert seen.teacher[0].texts[0] == ("a red cat", 1.0)
    assert [found.own for found in seen.teacher] == [(1.0, 1), (0.0, 2), None]


def test_an_embedding_that_is_not_finite_has_no_nearest_texts() -> None:
    rows = torch.tensor([[math.nan] * 8, [0.0] * 7 + [math.inf], [1.0] + [0.0] * 7])
    found = find_nearest(rows, WORDS, CAPTIONS)
    assert [len(one.texts) for one in found] == [0, 0, 3]
    assert found[0].own is None


def test_a_student_with_weights_that_are_not_finite_is_still_shown(tmp_path: Path) -> None:
    config, student, shown = make()
    with torch.no_grad():
        student.to_decoder.weight[0, 0] = math.nan
    seen = seen_by(student, shown)
    record = collect_facts(seen, shown, 5, config.model.mask)
    assert record["pictures"][0]["masked_mse"] is None
    save(tmp_path, 5, encode_png(contact_sheet.draw(seen, shown, "t")), record)
    assert json.loads((tmp_path / "step_00000005.json").read_text())["pictures"][0]["student"] == {
        "nearest": [],
        "own": None,
    }
    assert "not finite" in render_markdown(record)


def test_without_reconstruction_only_texts_and_without_a_teacher_only_pictures(tmp_path: Path) -> None:
    config, student, shown = make("loss.reconstruction=0")
    seen = seen_by(student, shown)
    assert [line.shape for line in seen.lines] == [(3, 2, 3, 32, 32)]  # scene and person, as they are
    assert seen.errors == (None, None, None)
    assert seen.student is not None
    save(
        tmp_path,
        1,
        encode_png(contact_sheet.draw(seen, shown, "t")),
        collect_facts(seen, shown, 1, config.model.mask),
    )
    config, student, shown = make("loss.relation=0", "loss.similarity=0")
    seen = seen_by(student, shown)
    assert (seen.student, seen.teacher) == (None, None)
    record = collect_facts(seen, shown, 2, config.model.mask)
    assert render_markdown(record) == ""
    save(tmp_path, 2, encode_png(contact_sheet.draw(seen, shown, "t")), record)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001.json",
        "step_00000001.png",
        "step_00000002.png",
    ]


def test_the_record_matches_the_shown_results() -> None:
    config, student, shown = make("model.mask=block")
    record = collect_facts(seen_by(student, shown), shown, 7, config.model.mask)
    about = {key: record[key] for key in ("format", "format_version", "step", "data", "mask", "texts")}
    assert about == {
        "format": "uniemox-samples",
        "format_version": 1,
        "step": 7,
        "data": "d",
        "mask": "block",
        "texts": 3,
    }
    first = record["pictures"][0]
    assert (first["key"], first["caption"]) == ("k0", "a red cat")
    assert first["teacher"]["nearest"][0] == {"text": "a red cat", "cosine": 1.0}
    assert first["teacher"]["own"] == {"cosine": 1.0, "rank": 1}


def test_captions_cannot_end_a_cell_of_the_table_or_become_markup() -> None:
    _, student, shown = make()
    hostile = "a | b <script> *c* [d](e)"
    texts = replace(WORDS, texts=(hostile, *WORDS.texts[1:]))
    shown = replace(shown, texts=texts, captions=(hostile, "", ""))
    text = render_markdown(collect_facts(seen_by(student, shown), shown, 1, "random"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}
    assert "<script>" not in text
    assert "](" not in text


def test_a_sheet_holds_every_tile_and_outlines_persons_in_masked_scenes_only() -> None:
    _, student, shown = make("model.mask=person")
    seen = seen_by(student, shown)
    pixels = contact_sheet.draw(seen, shown, "title", boxes=True)
    assert pixels.shape[1] == 2 * contact_sheet.MARGIN + 2 * contact_sheet.CARD + contact_sheet.MARGIN
    top = contact_sheet.MARGIN + 2 * contact_sheet.LINE
    tile = np.asarray(
        Image.fromarray(shown.scene_B3HW[0].permute(1, 2, 0).numpy()).resize((contact_sheet.TILE,) * 2, 3)
    )
    found = pixels[
        top : top + contact_sheet.TILE, contact_sheet.MARGIN : contact_sheet.MARGIN + contact_sheet.TILE
    ]
    assert np.array_equal(found, tile)
    outline = (pixels == np.array(contact_sheet.BOX)).all(2)
    ys, xs = np.nonzero(outline)
    left = (
        contact_sheet.MARGIN
        + contact_sheet.CARD
        + contact_sheet.MARGIN
        + contact_sheet.TILE
        + contact_sheet.GAP
    )  # masked tile of the second card
    assert (xs.min(), ys.min()) == (left, top)
    assert xs.max() == left + (contact_sheet.TILE - 1) // 2
    assert not (contact_sheet.draw(seen, shown, "title") == np.array(contact_sheet.BOX)).all(2).any()


@pytest.mark.parametrize(
    "text", ["short", "several words that need more than a single line", "x" * 200, "äöü " * 90]
)
def test_wrapped_lines_fit_and_say_when_they_are_cut(text: str) -> None:
    width = 240
    lines = contact_sheet.wrap(text, width)
    font = contact_sheet._font(contact_sheet.TEXT, bold=False)
    assert 1 <= len(lines) <= contact_sheet.MOST_LINES
    assert all(font.getlength(line) <= width for line in lines)
    whole = " ".join(lines) if " " in text else "".join(lines)
    assert whole == text.strip() or (lines[-1].endswith("…") and text.startswith(lines[0]))
