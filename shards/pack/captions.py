"""Composes captions from label and attributes with templates that users can edit; captions.yaml documents them."""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, format_os_error

_TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\[|\]|\{[^{}\[\]]*\}|[{}]|[^\[\]{}]+")
_ESCAPED = {"[[": "[", "]]": "]", "{{": "{", "}}": "}"}
_ARTICLE = re.compile(r"\b([Aa])\(n\)(?=\W*(\w*))")
_AN = re.compile(
    r"(?!eu|one\b|once|uku|us[eu]|ut[ei]|uni(?![dmn]))[aeiou]|hour|hono|honest|heir", re.IGNORECASE
)
"""Words that take "an"; the choice follows the sound: a unicorn, an hour."""


def _check_template(template: str) -> str:
    parts = _parse(template)
    if not any(_fields(tokens) for _, tokens in parts):
        raise ValueError(
            "has no {field}: every picture would get the same caption; name one, such as {label}"
        )
    if any(optional and not _fields(tokens) for optional, tokens in parts):
        raise ValueError("has a part in [ ] without a {field}; name one there, or write [[ ]] for brackets")
    return template


def _check_rising(words: list[tuple[float, str]]) -> list[tuple[float, str]]:
    limits = [limit for limit, _ in words]
    if any(low >= high for low, high in pairwise(limits)):
        raise ValueError("the limits do not rise; the first one not below a number counts, so sort them")
    return words


class _Field(BaseModel):
    """The rules by which the values of one field become words."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lower: bool = False
    names: dict[str, str] = {}
    words: Annotated[list[tuple[FiniteFloat, str]], AfterValidator(_check_rising)] | None = None
    lead: list[str] = []
    most: int | None = Field(default=None, ge=1, strict=True)
    article: bool = False
    bare: list[str] = []
    join: str | None = None


class _Templates(BaseModel):
    """A file of templates."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    given: Literal["keep", "add"] = "keep"
    templates: list[Annotated[str, AfterValidator(_check_template)]] = Field(min_length=1)
    fields: dict[str, _Field] = {}


class _Name(str):
    """The name of a field in a template."""


_Part = tuple[bool, tuple[str, ...]]
"""Whether a part is optional, and its texts and fields."""


@dataclass(frozen=True)
class Captioner:
    """Composes captions with one file of templates. Hashable and cheap to pickle."""

    content: bytes
    """The file's content as canonical JSON."""

    @property
    def identity(self) -> dict[str, Any]:
        """The templates, for the manifest's provenance."""
        return dict(_load(self.content).model_dump(mode="json"))

    def captions(
        self, given: tuple[str, ...], label: str | None, attributes: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """The captions of a picture without repeats: given ones first, then composed ones in the order of the
        templates."""
        settings = _load(self.content)
        if given and settings.given == "keep":
            return given
        values = {**attributes, "label": label}
        composed = (_compose(_parse(template), values, settings.fields) for template in settings.templates)
        return tuple(dict.fromkeys([*given, *(text for text in composed if text)]))


def load_captioner(spec: str | None) -> Captioner | None:
    """Loads the captioner of `--captions`: "shipped", a YAML file, or None (no captioner) for None and "none".

    Raises:
        UserError: if the file is unreadable or wrong; one line per mistake.
    """
    if spec is None or spec == "none":
        return None
    where = f"--captions={spec}"
    try:
        if spec == "shipped":
            text = (resources.files("shards") / "pack" / "captions.yaml").read_text(encoding="utf-8")
        else:
            text = Path(spec).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = format_os_error(error) if isinstance(error, OSError) else error
        raise UserError(f"{where}: cannot be read ({reason}); give `shipped` or a YAML file") from None
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds no `templates:`; start from a copy of the shipped captions.yaml")
    try:
        settings = _Templates.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in _describe_mistakes(error))) from None
    try:
        return Captioner(canonical_json(settings.model_dump(mode="json")))
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{where}: holds {half!r}, half of a character; write the character itself") from None


def _describe_mistakes(error: ValidationError) -> Iterator[str]:
    for issue in error.errors():
        path = ".".join(str(part) for part in issue["loc"])
        problem = issue["msg"].removeprefix("Value error, ")
        problem = problem[:1].lower() + problem[1:]
        if issue["type"] == "extra_forbidden":
            model = _Templates if len(issue["loc"]) == 1 else _Field
            near = difflib.get_close_matches(str(issue["loc"][-1]), model.model_fields, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            yield f"{path}: unknown key; {meant}valid are {', '.join(model.model_fields)}"
        elif issue["type"] == "missing":
            yield f"{path}: required, but not given"
        elif issue["type"] == "string_type":
            yield f"{path}={issue['input']!r}: not a text; write it in quotes"
        else:
            yield f"{path}={issue['input']!r}: {problem}"


@lru_cache(maxsize=4)
def _load(content: bytes) -> _Templates:
    return _Templates.model_validate_json(content)


@lru_cache(maxsize=64)
def _parse(template: str) -> tuple[_Part, ...]:
    """The parts of a template, in order.

    Raises:
        ValueError: for unmatched brackets or braces.
    """
    parts: list[_Part] = []
    tokens: list[str] = []
    optional = False
    for token in _TOKEN.findall(template):
        if token in ("[", "]"):
            if (token == "[") == optional:
                raise ValueError("brackets do not match; put each optional part in one pair of [ ]")
            parts.append((optional, tuple(tokens)))
            tokens, optional = [], token == "["
        elif token in _ESCAPED:
            tokens.append(_ESCAPED[token])
        elif token[0] == "{" and token[1:-1].strip():
            tokens.append(_Name(token[1:-1].strip()))
        elif token[0] in "{}":
            raise ValueError("braces do not match; a field is {name}, and braces themselves are {{ }}")
        else:
            tokens.append(token)
    if optional:
        raise ValueError("an optional part [ is not closed; close it with ]")
    return (*parts, (False, tuple(tokens)))


def _fields(tokens: tuple[str, ...]) -> list[str]:
    return [token for token in tokens if isinstance(token, _Name)]


def _compose(parts: tuple[_Part, ...], values: Mapping[str, Any], fields: Mapping[str, _Field]) -> str:
    """The caption of one template; "" if no field is known, or a field outside of optional parts is unknown."""
    pieces: list[str] = []
    known = 0
    for optional, tokens in parts:
        words = [
            _words_of(values.get(token), fields.get(token, _PLAIN)) if isinstance(token, _Name) else token
            for token in tokens
        ]
        if all(words):
            pieces += words
            known += len(_fields(tokens))
        elif not optional:
            return ""
    if not known:
        return ""
    text = _ARTICLE.sub(lambda found: found[1] + ("n" if _AN.match(found[2]) else ""), "".join(pieces))
    text = re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip(" ,;:")
    return text[:1].upper() + text[1:]


def _words_of(value: Any, field: _Field) -> str:
    """The words for a value; "" for an unknown one."""
    items = value if isinstance(value, list | tuple) else [value]
    phrases = list(dict.fromkeys(word for word in (_word_of_item(item, field) for item in items) if word))
    phrases = phrases[: field.most]
    if field.article:
        phrases = [_with_article(word, field.bare) for word in phrases]
    if field.join is not None:
        return field.join.join(phrases)
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _word_of_item(value: Any, field: _Field) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    text = str(value)
    whole, slash, last = text.rpartition("/")
    phrase = re.sub(r"[\s_/]+", " ", f"{last} {whole}" if slash and last in field.lead else text).strip()
    phrase = phrase.lower() if field.lower else phrase
    for name in (text, phrase):
        if name in field.names:
            return field.names[name]
    if field.words is None:
        return phrase
    try:
        return next((word for limit, word in field.words if float(value) <= limit), "")
    except (ValueError, OverflowError):
        return ""


def _with_article(words: str, bare: list[str]) -> str:
    few = words.startswith(("some ", "a ", "an ")) or words.lower().split()[-1] in bare
    return words if few else f"a(n) {words}"


_PLAIN = _Field()
