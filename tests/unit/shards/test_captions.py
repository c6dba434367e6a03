"""Captions from templates: what they say, and which templates are none."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from shards.captions import Captioner, load_captioner
from uniemox_dist.runtime.errors import UserError


def shipped() -> Captioner:
    captioner = load_captioner("shipped")
    assert captioner is not None
    return captioner


def made(tmp_path: Path, text: str) -> Captioner:
    (tmp_path / "c.yaml").write_text(text)
    captioner = load_captioner(str(tmp_path / "c.yaml"))
    assert captioner is not None
    return captioner


EVERYTHING = {
    "scene": "bakery/shop",
    "object": ["Cake", "Person", "Table", "Chair", "Cup", "Cake"],
    "brightness": 0.2,
    "colorfulness": 0.9,
    "facial_expression": "angry",
    "human_action": "eating",
}


@pytest.mark.parametrize(
    ("label", "attributes", "captions"),
    [
        ("awe", {}, ["A picture that evokes awe."]),
        (
            "amusement",
            EVERYTHING,
            [
                "A picture that evokes amusement, showing a bakery shop, with cake, person, table and chair.",
                "A dark colorful picture of a bakery shop with cake, person, table and chair.",
                "Someone with an angry face is eating in a bakery shop.",
            ],
        ),
        (
            "fear",
            {"scene": "ice_rink", "object": ["Dog"], "brightness": 0.5, "colorfulness": 1},
            [
                "A picture that evokes fear, showing an ice rink, with dog.",
                "A colorful picture of an ice rink with dog.",
            ],
        ),
        (None, {"scene": "attic", "brightness": 0.1}, ["A dark picture of an attic."]),
        (None, {"human_action": "running"}, ["Someone is running."]),
        (
            None,
            {"object": [], "scene": "", "brightness": float("nan"), "human_action": None, "label": True},
            [],
        ),
    ],
)
def test_the_shipped_templates_say_what_is_known(
    label: str | None, attributes: dict[str, Any], captions: list[str]
) -> None:
    assert list(shipped().captions((), label, attributes)) == captions


def test_given_captions_are_kept_or_come_first(tmp_path: Path) -> None:
    given = ("my dog", "A picture of joy.")
    assert shipped().captions(given, "joy", {}) == given
    adding = made(tmp_path, 'given: add\ntemplates: ["A picture of {label}.", "{label}"]\n')
    assert adding.captions(given, "joy", {}) == (*given, "Joy")
    assert adding.captions((), None, {}) == ()


def test_brackets_braces_names_and_words(tmp_path: Path) -> None:
    text = """
templates: ["[[{label}]] {{x}}[ at {n}][ ({place})]"]
fields:
  label: {names: {joy: joyfulness}}
  n: {words: [[10, few], [100, many]]}
"""
    captioner = made(tmp_path, text)
    assert captioner.captions((), "joy", {"n": 10}) == ("[joyfulness] {x} at few",)
    assert captioner.captions((), "fear", {"n": 11, "place": "a_b"}) == ("[fear] {x} at many (a b)",)
    assert captioner.captions((), "fear", {"n": 101}) == ("[fear] {x}",)
    assert captioner.captions((), "fear", {"n": "no number"}) == ("[fear] {x}",)


def test_a_captioner_survives_pickling_and_names_its_templates(tmp_path: Path) -> None:
    captioner = made(tmp_path, 'templates: ["{label}"]')
    again = pickle.loads(pickle.dumps(captioner))
    assert again == captioner
    assert hash(again) == hash(captioner)
    assert again.captions((), "joy", {}) == ("Joy",)
    assert captioner.identity == {"given": "keep", "templates": ["{label}"], "fields": {}}


def test_none_leaves_captions_alone() -> None:
    assert load_captioner(None) is load_captioner("none") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("templates: []", "templates: list should have at least 1 item"),
        ('templates: ["a photo"]', "templates: 'a photo' has no {field}"),
        ('templates: ["{label"]', "braces do not fit"),
        ('templates: ["{label} [x"]', "an optional part [ is not closed"),
        ('templates: ["{label} [x [y]]"]', "brackets do not fit"),
        ('templates: ["{label}"]\ngiven: maybe', "given: input should be 'keep' or 'add'"),
        (
            'templates: ["{label}"]\ntempaltes: 1',
            "tempaltes: extra inputs are not permitted; valid are given",
        ),
        ('templates: ["{label}"]\nfields: {x: {most: 0}}', "fields.x.most: input should be greater"),
        ("templates: [", "is not valid YAML"),
    ],
)
def test_mistakes_name_file_field_and_problem(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        made(tmp_path, text)
    assert says in str(caught.value)
    assert "c.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read"):
        load_captioner(str(tmp_path / "no.yaml"))
