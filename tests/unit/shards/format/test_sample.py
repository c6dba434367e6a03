"""Keys, the sample JSON and the members of a sample."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.detect.types import Person
from shards.format.sample import EXTENSIONS, KEY_PATTERN, Sample, make_key, parse_record


def sample(**changes: object) -> Sample:
    values = {
        "key": "cat-1",
        "image": b"\xff\xd8 not decoded here",
        "extension": "jpg",
        "width": 640,
        "height": 480,
        "source": "cats/1.jpg",
        "captions": ("a cat on a mat", "schläft"),
        "label": "cat",
        "attributes": {"place": "Zürich", "age": 3},
        "persons": (Person((0.1, 0.2, 0.5, 1.0), 0.87, {"mood": "calm"}),),
        "image_sha256": "ab" * 32,
    }
    return Sample(**{**values, **changes})  # type: ignore[arg-type]


@given(st.text(max_size=80))
def test_every_name_gives_a_legal_key(name: str) -> None:
    key = make_key(name)
    assert KEY_PATTERN.fullmatch(key)
    assert key == (name if KEY_PATTERN.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:16])


@pytest.mark.parametrize("name", ["a", "1f600", "A-b_9", "x" * 64])
def test_a_legal_name_is_its_own_key(name: str) -> None:
    assert make_key(name) == name


@pytest.mark.parametrize(
    "name", ["", "-a", "_a", "a.b", "a/b", "a b", "é", "x" * 65, "a\n", "../a", "1f600-200d\u200d"]
)
def test_any_other_name_becomes_16_hex_digits_of_its_hash(name: str) -> None:
    assert make_key(name) == hashlib.sha256(name.encode()).hexdigest()[:16]


BEFORE = {
    "label": "cat",
    "attributes": {"place": "Zürich", "age": 3},
    "captions": ["a cat on a mat", "schläft"],
    "width": 640,
    "height": 480,
    "persons": [{"box": [0.1, 0.2, 0.5, 1.0], "score": 0.87, "labels": {"mood": "calm"}}],
    "source": "cats/1.jpg",
    "image_sha256": "ab" * 32,
}
"""The JSON of the sample as it was written first."""


def test_the_json_of_a_sample_matches_the_format() -> None:
    texts = {
        "attributes": '{"age": 3, "place": "Zürich"}',
        "persons": '[{"box": [0.1, 0.2, 0.5, 1.0], "labels": {"mood": "calm"}, "score": 0.87}]',
    }
    assert sample().to_json() == {**BEFORE, **texts, "label_distribution": "{}"}
    shares = sample(distribution={"joy": 0.75, "awe": 0.25}).to_json()["label_distribution"]
    assert shares == '{"awe": 0.25, "joy": 0.75}'


def test_fields_without_a_value_have_the_same_types_as_all_others() -> None:
    empty = sample(label=None, captions=(), attributes={}, persons=()).to_json()
    names = ("label", "label_distribution", "captions", "attributes", "persons")
    assert {name: empty[name] for name in names} == {
        "label": "",
        "label_distribution": "{}",
        "captions": [""],
        "attributes": "{}",
        "persons": "[]",
    }
    assert {name: type(value) for name, value in empty.items()} == {
        name: type(value) for name, value in sample(distribution={"joy": 1.0}).to_json().items()
    }


def test_a_json_of_today_and_one_of_before_read_the_same() -> None:
    shares: dict[str, None] = {"label_distribution": None}
    assert parse_record(sample().to_json()) == parse_record(BEFORE) == {**BEFORE, **shares}
    none = {"label": None, "captions": [], "attributes": {}, "persons": []}
    today = sample(label=None, captions=(), attributes={}, persons=()).to_json()
    assert parse_record(today) == parse_record({**BEFORE, **none}) == {**BEFORE, **none, **shares}
    with_shares = parse_record(sample(distribution={"joy": 0.75, "awe": 0.25}).to_json())
    assert with_shares["label_distribution"] == {"awe": 0.25, "joy": 0.75}
    foreign = {"label": "", "captions": [""], "attributes": "{}", "persons": "x"}
    assert parse_record(foreign) == foreign


def test_members_are_picture_json_and_first_caption_in_this_order() -> None:
    (image, record, caption) = sample().members()
    assert image == ("cat-1.jpg", b"\xff\xd8 not decoded here")
    assert record[0] == "cat-1.json"
    assert json.loads(record[1]) == sample().to_json()
    assert record[1].startswith(
        b'{"attributes": "{\\"age\\": 3, \\"place\\": \\"Z\xc3\xbcrich\\"}", "captions": ['
    )  # sorted, UTF-8
    assert caption == ("cat-1.txt", b"a cat on a mat")


def test_the_text_member_is_there_without_a_caption() -> None:
    assert sample(captions=()).members()[2] == ("cat-1.txt", b"")


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sample(attributes={"x": float("nan")}).members()


def test_the_extensions_are_those_of_the_format() -> None:
    assert EXTENSIONS == {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
