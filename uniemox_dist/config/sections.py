"""The base class and the types of all sections of the configuration, and validation errors as lines for the user."""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Amount = Annotated[float, Field(gt=0.0, le=1e6)]
Seconds = Annotated[int, Field(ge=1, le=30 * 24 * 3600)]
"""A time to wait, at most 30 days."""
Rgb = tuple[float, float, float]
_QUOTED = re.compile(r"'[^']*'")
"""A value in a message, which may have dots; outside of values only places such as run.seed have."""


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def explain_errors(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Yields one line per error: dotted path, value and the expected value; for an unknown key, the nearest known
    one."""
    for issue in error.errors():
        path = ".".join(str(part) for part in issue["loc"])
        if issue["type"] == "extra_forbidden":
            known = _known_keys(issue["loc"][:-1], model)
            near = difflib.get_close_matches(str(issue["loc"][-1]), known, n=1, cutoff=0.5)
            prefix = path.rpartition(".")[0]
            hint = (
                f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
                if near
                else f"known: {', '.join(known)}"
            )
            yield f"{path}: unknown key; {hint}"
        elif issue["type"] == "value_error":
            message = str(issue["ctx"]["error"])
            is_placed = message.startswith(path) or "." in _QUOTED.sub("", message).split("=")[0]
            yield message if is_placed else f"{path}: {message}"
        elif issue["loc"][-1:] == ("[key]",):
            known_keys = str(issue["msg"]).removeprefix("Input should be ").replace("'", "")
            yield f"{path.removesuffix('.[key]')}: unknown key; valid are {known_keys}"
        elif issue["type"] == "missing":
            yield f"{path}: required, but not given"
        else:
            yield f"{path}={issue['input']!r}: {issue['msg'][0].lower()}{issue['msg'][1:]}"


def _known_keys(path: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    section = model
    for part in path:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        args = getattr(annotation, "__args__", ())
        candidates = [annotation, *args]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
