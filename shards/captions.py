"""Captions composed from label and attributes, by templates that users can edit: see captions.yaml."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from uniemox_dist.config.load import parse_yaml
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import canonical_json

_TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\[|\]|\{[^{}\[\]]*\}|[{}]|[^\[\]{}]+")
_ESCAPED = {"[[": "[", "]]": "]", "{{": "{", "}}": "}"}


class _Field(BaseModel):
    """How the values of one field are said."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    most: int | None = Field(default=None, ge=1)
    lower: bool = False
    words: list[tuple[float, str]] | None = None
    names: dict[str, str] = {}


class _Templates(BaseModel):
    """A file of templates."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    given: Literal["keep", "add"] = "keep"
    templates: list[str] = Field(min_length=1)
    fields: dict[str, _Field] = {}

    @field_validator("templates")
    @classmethod
    def _are_sound(cls, templates: list[str]) -> list[str]:
        for template in templates:
            parts = _parse(template)
            if not any(isinstance(token, _Name) for _, tokens in parts for token in tokens):
                raise ValueError(f"{template!r} has no {{field}}: every picture would get the same caption")
        return templates


class _Name(str):
    """The name of a field in a template."""


_Part = tuple[bool, tuple[str, ...]]
"""Whether a part is optional, and its texts and fields."""


@dataclass(frozen=True)
class Captioner:
    """Composes captions by one file of templates. Hashable and cheap to pickle."""

    content: bytes
    """The file's content as canonical JSON."""

    @property
    def identity(self) -> dict[str, Any]:
        """The templates, for the manifest's provenance."""
        return dict(_load(self.content).model_dump(mode="json"))

    def captions(
        self, given: tuple[str, ...], label: str | None, attributes: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """The captions of a picture: given ones first, none of them twice, in the order of the templates."""
        settings = _load(self.content)
        if given and settings.given == "keep":
            return given
        values = {**attributes, "label": label}
        composed = (_compose(_parse(template), values, settings.fields) for template in settings.templates)
        return tuple(dict.fromkeys([*given, *(text for text in composed if text)]))


def load_captioner(spec: str | None) -> Captioner | None:
    """The captioner of `--captions`: None or "none" for none, "shipped", or a YAML file.

    Raises:
        UserError: naming the file and each mistake in it.
    """
    if spec is None or spec == "none":
        return None
    try:
        if spec == "shipped":
            text = (resources.files("shards") / "captions.yaml").read_text(encoding="utf-8")
        else:
            text = Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--captions={spec}: cannot be read ({error}); give `shipped` or a YAML file"
        ) from None
    try:
        settings = _Templates.model_validate(parse_yaml(text, spec))
    except ValidationError as error:
        raise UserError("\n".join(_mistake(spec, dict(found)) for found in error.errors())) from None
    return Captioner(canonical_json(settings.model_dump(mode="json")))


def _mistake(spec: str, found: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in found["loc"])
    problem = found["msg"].removeprefix("Value error, ")
    known = (
        "; valid are given, templates, fields"
        if found["type"] == "extra_forbidden" and "." not in where
        else ""
    )
    return f"--captions={spec}: {where}: {problem[:1].lower()}{problem[1:]}{known}"


@lru_cache(maxsize=4)
def _load(content: bytes) -> _Templates:
    return _Templates.model_validate_json(content)


@lru_cache(maxsize=64)
def _parse(template: str) -> tuple[_Part, ...]:
    """The parts of a template, in order.

    Raises:
        ValueError: for brackets or braces that do not fit.
    """
    parts: list[_Part] = []
    tokens: list[str] = []
    optional = False
    for token in _TOKEN.findall(template):
        if token in ("[", "]"):
            if (token == "[") == optional:
                raise ValueError(
                    f"{template!r}: brackets do not fit; optional parts stand in one pair of [ ] each"
                )
            parts.append((optional, tuple(tokens)))
            tokens, optional = [], token == "["
        elif token in _ESCAPED:
            tokens.append(_ESCAPED[token])
        elif token[0] == "{" and len(token) > 2:
            tokens.append(_Name(token[1:-1].strip()))
        elif token[0] in "{}":
            raise ValueError(f"{template!r}: braces do not fit; a field is {{name}}")
        else:
            tokens.append(token)
    if optional:
        raise ValueError(f"{template!r}: an optional part [ is not closed")
    return (*parts, (False, tuple(tokens)))


def _compose(parts: tuple[_Part, ...], values: Mapping[str, Any], fields: Mapping[str, _Field]) -> str:
    """The caption of one template; "" where a field outside of optional parts is not known."""
    said: list[str] = []
    for optional, tokens in parts:
        words = [
            _say(values.get(token), fields.get(token)) if isinstance(token, _Name) else token
            for token in tokens
        ]
        if all(words):
            said += words
        elif not optional:
            return ""
    text = re.sub(
        r"\b([Aa])\(n\)(\s+)(?=(.))",
        lambda m: m[1] + ("n" if m[3] in "aeiouAEIOU" else "") + m[2],
        "".join(said),
    )
    text = re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip(" ,;:")
    return text[:1].upper() + text[1:]


def _say(value: Any, field: _Field | None) -> str:
    """A value in words; "" where there is none."""
    if isinstance(value, list | tuple):
        items = [said for said in (_say(item, field) for item in value) if said]
        items = list(dict.fromkeys(items))[: field.most if field else None]
        return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
    if (
        value is None
        or isinstance(value, bool | dict)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return ""
    if field is not None and str(value) in field.names:
        return field.names[str(value)]
    if field is not None and field.words is not None:
        try:
            return next((word for limit, word in field.words if float(value) <= limit), "")
        except ValueError:
            return ""
    said = re.sub(r"[\s_/]+", " ", str(value)).strip()
    return said.lower() if field is not None and field.lower else said
