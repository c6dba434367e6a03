"""What a release is, and whether it is still what it was: for programs that load one, and for people."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uniemox_dist.release.weights import ENCODER, REST
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, sha256_file

CONFIG, FACTS, CARD, SUMS, ONNX = "config.json", "uniemox.json", "README.md", "SHA256SUMS", "encoder.onnx"
FORMAT, FORMAT_VERSION = "uniemox-release", 1


def read_release(path: str | Path, *, verify: bool = False, field: str = "RELEASE") -> dict[str, Any]:
    """What uniemox.json says, after a look whether this is a release that this version reads.

    Raises:
        UserError: if the folder is no release, or (with verify) a file was altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{field}={folder}: no such folder; give one that `uniemox release RUN OUT` wrote")
    for name in (FACTS, ENCODER, REST, CONFIG, SUMS):
        if not (folder / name).is_file():
            raise UserError(f"{field}={folder}: lacks {name}; write it with `uniemox release RUN OUT`")
    try:
        facts = read_json(folder / FACTS)
        known = facts["format"] == FORMAT and isinstance(facts["config"], dict)
        version = int(facts["format_version"])
    except (ValueError, KeyError, TypeError):
        known, facts, version = False, {}, 0
    if not known:
        raise UserError(f"{field}={folder}: {FACTS} is not one of a release; copy the release again")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{field}={folder}: is of format {version}, which a newer uniemox-dist wrote; update this one"
        )
    if verify:
        for name, problem in altered(folder):
            raise UserError(f"{field}={folder}: {name} {problem}; copy the release again")
    return dict(facts)


def altered(folder: Path) -> Iterator[tuple[str, str]]:
    """The files of a release that are not as SHA256SUMS says, and what is wrong with each."""
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if not name or "/" in name:
            yield SUMS, f"has a line that is none of a release's: {line[:80]!r}"
        elif not (folder / name).is_file():
            yield name, "is missing"
        elif sha256_file(folder / name) != digest:
            yield name, "was altered (SHA-256 differs)"


def check(path: Path) -> int:
    """Rechecks a release: hashes, that every weight is finite, and that all fit its settings. Returns how many tensors
    there are.

    Raises:
        UserError: naming the first thing that is wrong.
    """
    from safetensors import safe_open

    from uniemox_dist.release.load import load_pretrained

    read_release(path, verify=True)
    count = 0
    for file in (ENCODER, REST):
        with safe_open(path / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                count += 1
                if not tensors.get_tensor(name).isfinite().all():
                    raise UserError(f"RELEASE={path}: {file}: {name} is not finite; release another step")
    load_pretrained(path)
    return count


def describe(path: Path) -> list[str]:
    """A release in lines for a terminal."""
    facts = read_release(path)
    config, data, teacher = facts["config"], facts.get("data"), facts.get("teacher")
    model = config["model"]
    labels = (data or {}).get("labels") or []
    sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    rows = {
        "run": f"{facts['run']}, step {facts['step']:,} ({facts['slots']:,} samples), {facts['weights']} weights",
        "encoder": f"{model.get('name') or 'ViT'}, {model['width']} wide, {model['depth']} blocks, patches of "
        f"{model['patch_size']} px in {model['image_size']} px, {facts['parameters'] / 1e6:.1f} M parameters, "
        f"{facts.get('dtype', 'fp32')}",
        "feature": f"{facts['feature']}, {model['width']} wide",
        "space": f"{facts['embedding_width']} wide, of {teacher['name']}" if teacher else "none (no teacher)",
        "data": f"{facts['data_identity'][:16]}…"
        + (f", {data['samples']:,} samples in {data['shards']:,} shards" if data else ""),
        "labels": ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")
        or "–",
        "losses": ", ".join(f"{k} {v:.4f}" for k, v in (facts["losses"] or {}).items() if v is not None)
        or "–",
        "licence": facts.get("licence") or "not stated; those of the training data and the teacher apply",
        "written by": f"uniemox-dist {facts['uniemox_dist']}, format {facts['format_version']}",
        "files": ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items() if size >= 50_000),
    }
    architecture = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("architecture", "?")
    rows["timm"] = f'timm.create_model("local-dir:{path}", pretrained=True, num_classes=0)  # {architecture}'
    return [f"{name:<11} {value}" for name, value in rows.items()]
