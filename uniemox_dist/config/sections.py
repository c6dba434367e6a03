"""The base class and the types of all sections of the configuration."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Amount = Annotated[float, Field(gt=0.0, le=1e6)]
Seconds = Annotated[int, Field(ge=1, le=30 * 24 * 3600)]
"""A time to wait, at most 30 days."""
Rgb = tuple[float, float, float]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
