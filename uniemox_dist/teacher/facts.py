"""What a run must know of its teacher, whether the teacher itself is at hand or only what it once said."""

import math
from dataclasses import dataclass
from typing import Any

from uniemox_dist.core.files import canonical_json, sha256_bytes


@dataclass(frozen=True)
class TeacherFacts:
    """A teacher's identity, embedding width E and logit scale."""

    identity: dict[str, Any]
    """name, weights_sha256, size, mean, std, activation, embedding_width."""
    width: int
    logit_scale: float

    @property
    def id(self) -> str:
        """Short name of what decides the embeddings of texts; caches are filed under it."""
        # Neither the name (the same weights in another folder are the same teacher) nor what concerns pixels.
        content = {k: self.identity[k] for k in ("weights_sha256", "activation", "embedding_width")}
        return sha256_bytes(canonical_json(content))[:16]

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object."""
        return {"identity": self.identity, "width": self.width, "logit_scale": self.logit_scale}

    @classmethod
    def from_json(cls, record: Any) -> "TeacherFacts":
        """The facts from `to_json`'s object.

        Raises:
            ValueError: if it is none.
        """
        try:
            facts = cls(dict(record["identity"]), record["width"], float(record["logit_scale"]))
            name, sha256, size = (facts.identity[k] for k in ("name", "weights_sha256", "size"))
            whole = isinstance(name, str) and isinstance(sha256, str) and isinstance(size, int)
            pairs = [facts.identity[k] for k in ("mean", "std")]
            whole = whole and all(len([float(x) for x in values]) == 3 for values in pairs)
            whole = whole and isinstance(facts.width, int) and facts.width > 0
            whole = whole and facts.width == facts.identity["embedding_width"]
            if not whole or not math.isfinite(facts.logit_scale) or not facts.id:
                raise ValueError("a value is none that a teacher has")
        except (KeyError, TypeError) as error:
            raise ValueError(f"facts of a teacher lack {error}") from None
        return facts
