"""Which masks, fusion, losses and teacher a run was made with, in words: from its resolved configuration."""

from collections.abc import Mapping
from typing import Any

from uniemox_dist.config.losses import LOSS_TERMS

FUSIONS = {
    "prior": "psychological prior: λ ⊙ scene + person",
    "multi_head": "multi-head weighted sum of scene and person",
    "attention": "attention-weighted sum of scene and person",
    "gated_mlp": "gated MLP of scene and person",
    "none": "none: the scene alone",
}
MASKS = {"random": "random patches", "block": "rectangles", "person": "person-aware"}
LOSSES = {term.name: term.title for term in LOSS_TERMS}
SOURCES = {"live": "its picture tower runs in every step", "cache": "cached views with its embeddings"}


def objective(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of what decides what is learned; nothing without a configuration."""
    model, loss, teacher = (config.get(section) or {} for section in ("model", "loss", "teacher"))
    if not model or not loss:
        return []
    learns = any(term.teacher and loss.get(term.name) for term in LOSS_TERMS)
    found = [("Losses", ", ".join(_weighted(loss)), _losses_remark(loss))]
    found.append(("Masks", _mask(model), _mask_remark(model)))
    if learns:
        fusion = str(model.get("fusion"))
        found.append(("Fusion", fusion, FUSIONS.get(fusion, "")))
        source = str(teacher.get("source", "live"))
        found.append(("Teacher", source, SOURCES.get(source, "")))
    return found


def _weighted(loss: Mapping[str, Any]) -> list[str]:
    names = {name: title for name, title in LOSSES.items() if loss.get(name)}
    weights = {loss[name] for name in names}
    plain = weights == {1.0}
    return [title if plain else f"{loss[name]:g} × {title}" for name, title in names.items()]


def _losses_remark(loss: Mapping[str, Any]) -> str:
    parts = [f"without {title}" for name, title in LOSSES.items() if not loss.get(name)]
    if loss.get("relation"):
        over = "the global batch" if loss.get("relation_over") == "global" else "the own micro-batch"
        parts.append(f"L1 as {loss.get('relation_form')} over {over}")
    if loss.get("reconstruction") and loss.get("norm_pix"):
        parts.append("L3 on standardised patches")
    if loss.get("person_reconstruction"):
        parts.append("L3 of both views")
    for name, points in (loss.get("schedule") or {}).items():
        line = " → ".join(f"{factor:g} at {100 * share:g} %" for share, factor in points)
        parts.append(f"{LOSSES.get(name, name)} scheduled: × {line}")
    return "; ".join(parts)


def _mask(model: Mapping[str, Any]) -> str:
    kind = str(model.get("mask"))
    return f"{MASKS.get(kind, kind)}, {100 * float(model.get('mask_ratio', 0)):g} %"


def _mask_remark(model: Mapping[str, Any]) -> str:
    if model.get("mask") == "person":
        return f"{100 * float(model.get('mask_person_share', 0)):g} % of them on the person"
    return "of each view"
