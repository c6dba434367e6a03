"""Captions from templates: their texts, and invalid templates."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from shards.pack.captions import Captioner, load_captioner
from uniemox_dist.core.errors import UserError


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
    "human_action": "eating_cake",
}


@pytest.mark.parametrize(
    ("label", "attributes", "captions"),
    [
        ("awe", {}, ["A picture that evokes awe."]),
        (
            "amusement",
            EVERYTHING,
            [
                "A dark picture in vivid colors that evokes amusement, showing a bakery shop, "
                "with a cake, a person, a table and a chair.",
                "A dark picture of a bakery shop with a cake, a person, a table and a chair, evoking amusement.",
                "Someone with an angry face is eating cake; the scene is a bakery shop.",
                "A person with an angry face; the scene is a bakery shop.",
            ],
        ),
        (
            "fear",
            {"scene": "ice_skating_rink/indoor", "object": ["Dog"], "brightness": 0.5, "colorfulness": 0},
            [
                "A picture in muted colors that evokes fear, showing an indoor ice skating rink, with a dog.",
                "A picture of an indoor ice skating rink with a dog, evoking fear.",
            ],
        ),
        (
            "awe",
            {"scene": "canal/urban", "brightness": 0.8, "colorfulness": 0.7},
            [
                "A bright picture that evokes awe, showing an urban canal.",
                "A bright picture of an urban canal, evoking awe.",
            ],
        ),
        (
            "contentment",
            {"object": ["Human hair", "Ice cream", "Unicycle", "Umbrella"], "brightness": 1},
            [
                "A bright picture that evokes contentment, with human hair, some ice cream, a unicycle and an umbrella."
            ],
        ),
        (
            "sadness",
            {"facial_expression": "sadness", "object": ["Clothing", "Sunglasses"]},
            ["A picture that evokes sadness, with clothing and sunglasses.", "A person with a sad face."],
        ),
        (
            "excitement",
            {"scene": "stadium/football", "human_action": "Parkour"},
            [
                "A picture that evokes excitement, showing a football stadium.",
                "A picture of a football stadium, evoking excitement.",
                "Someone is doing parkour; the scene is a football stadium.",
            ],
        ),
        (None, {"scene": "artists_loft", "brightness": 0.1}, ["A dark picture of an artist's loft."]),
        (None, {"human_action": "running"}, ["Someone is running."]),
        (
            None,
            {"object": [], "scene": "", "brightness": float("nan"), "human_action": None, "label": True},
            [],
        ),
    ],
)
def test_the_shipped_templates_use_all_known_fields(
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


def test_lists_names_and_words_that_lead(tmp_path: Path) -> None:
    text = """
templates: ["{things}", "{place}", "{plain}"]
fields:
  things: {most: 3, lower: true, article: true, bare: [milk], join: " + ", names: {X: an axe, tv: television}}
  place: {lead: [indoor]}
"""
    captioner = made(tmp_path, text)
    things = ["X", "TV", "Cow milk", "Y"]
    assert captioner.captions((), None, {"things": things}) == ("An axe + a television + cow milk",)
    assert captioner.captions((), None, {"place": "tennis_court/indoor"}) == ("Indoor tennis court",)
    assert captioner.captions((), None, {"place": "tennis_court/outdoor"}) == ("Tennis court outdoor",)
    assert captioner.captions((), None, {"plain": ["a", "b", "a", "", None, "c"]}) == ("A, b and c",)
    assert captioner.captions((), None, {"plain": ["a", "b"]}) == ("A and b",)


@pytest.mark.parametrize("value", [None, True, False, {}, {"a": 1}, [], [None], "", " _/", float("inf")])
def test_empty_values_count_as_unknown(tmp_path: Path, value: Any) -> None:
    captioner = made(
        tmp_path, 'templates: ["{x} b", "[{x} c]", "a[ {x}]{label}", "{label}[ with {x}, it seems]."]'
    )
    assert captioner.captions((), "joy", {"x": value}) == ("Ajoy", "Joy.")
    assert captioner.captions((), None, {"x": value}) == ()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("owl", "An owl"),
        ("Elephant", "An Elephant"),
        ("(old) dog", "An (old) dog"),
        ("uniform", "A uniform"),
        ("unidentified object", "An unidentified object"),
        ("urban park", "An urban park"),
        ("utility room", "A utility room"),
        ("one-way street", "A one-way street"),
        ("onesie", "An onesie"),
        ("hourglass", "An hourglass"),
    ],
)
def test_the_article_depends_on_the_next_word(tmp_path: Path, word: str, said: str) -> None:
    assert made(tmp_path, 'templates: ["a(n) {x}"]').captions((), None, {"x": word}) == (said,)


def test_spaces_and_punctuation_are_put_right(tmp_path: Path) -> None:
    captioner = made(tmp_path, 'templates: ["[{y}], the  {x} ;[ {y}]  here !"]')
    assert captioner.captions((), None, {"x": " two\nlines "}) == ("The two lines; here!",)


def test_a_captioner_survives_pickling_and_names_its_templates(tmp_path: Path) -> None:
    captioner = made(tmp_path, 'templates: ["{label}"]')
    again = pickle.loads(pickle.dumps(captioner))
    assert again == captioner
    assert hash(again) == hash(captioner)
    assert again.captions((), "joy", {}) == ("Joy",)
    assert captioner.identity == {"given": "keep", "templates": ["{label}"], "fields": {}}


def test_without_a_captioner_captions_are_unchanged() -> None:
    assert load_captioner(None) is load_captioner("none") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("templates: []", ["templates=[]: list should have at least 1 item after validation, not 0"]),
        ("templates: [3]", ["templates.0=3: not a text; write it in quotes"]),
        ("given: add", ["templates: required, but not given"]),
        ("", ["holds no `templates:`; start from a copy of the shipped captions.yaml"]),
        ("- a", ["holds no `templates:`; start from a copy of the shipped captions.yaml"]),
        ("templates: [", ["line 1 is not valid YAML: "]),
        (
            'templates: ["a photo", "{label}", "{label", "{ }", "{label} [x"]',
            [
                "templates.0='a photo': has no {field}: every picture would get the same caption; "
                "name one, such as {label}",
                "templates.2='{label': braces do not match; a field is {name}, and braces themselves are {{ }}",
                "templates.3='{ }': braces do not match; a field is {name}, and braces themselves are {{ }}",
                "templates.4='{label} [x': an optional part [ is not closed; close it with ]",
            ],
        ),
        (
            'templates: ["{label} [x [y]]", "x] {label}", "{label}[ here]"]',
            [
                "templates.0='{label} [x [y]]': brackets do not match; put each optional part in one pair of [ ]",
                "templates.1='x] {label}': brackets do not match; put each optional part in one pair of [ ]",
                "templates.2='{label}[ here]': has a part in [ ] without a {field}; name one there, or write [[ ]] "
                "for brackets",
            ],
        ),
        (
            'templates: ["{label}"]\ngiven: maybe\ntempaltes: 1',
            [
                "given='maybe': input should be 'keep' or 'add'",
                "tempaltes: unknown key; did you mean templates? valid are given, templates, fields",
            ],
        ),
        (
            'templates: ["{x}"]\nfields: {x: {most: 0, wordz: [], words: [[2, a], [1, b]], names: {1: one}}}',
            [
                "fields.x.names.1.[key]=1: not a text; write it in quotes",
                "fields.x.words=[[2, 'a'], [1, 'b']]: the limits do not rise; the first one not below a number "
                "counts, so sort them",
                "fields.x.most=0: input should be greater than or equal to 1",
                "fields.x.wordz: unknown key; did you mean words? valid are lower, names, words, lead, most, "
                "article, bare, join",
            ],
        ),
        (
            'templates: ["{x}"]\nfields: {x: {words: [[.nan, a]]}}',
            ["fields.x.words.0.0=nan: input should be a finite number"],
        ),
    ],
)
def test_all_mistakes_are_named_with_file_field_and_value(tmp_path: Path, text: str, says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        made(tmp_path, text)
    lines = str(caught.value).split("\n")
    assert len(lines) == len(says)
    for line, problem in zip(lines, says):
        assert line.startswith(f"--captions={tmp_path / 'c.yaml'}: {problem}")


@pytest.mark.parametrize(
    "place", ['templates: ["\\uD800{label}"]', 'templates: ["{x}"]\nfields: {x: {names: {a: "\\uDC00"}}}']
)
def test_an_unpaired_surrogate_is_refused_in_one_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(UserError) as caught:
        made(tmp_path, place)
    [line] = str(caught.value).split("\n")
    assert line.startswith(f"--captions={tmp_path / 'c.yaml'}: holds '\\ud")
    assert line.endswith("half of a character; write the character itself")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: cannot be read"):
        load_captioner(str(tmp_path / "no.yaml"))
