"""What a release is, and whether it is still what it was: for programs that load one, and for people."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uniemox_dist.config.mistakes import explain
from uniemox_dist.config.schema import Config
from uniemox_dist.release.weights import ENCODER, REST
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, sha256_file

CONFIG, FACTS, CARD, SUMS, ONNX = "config.json", "uniemox.json", "README.md", "SHA256SUMS", "encoder.onnx"
FORMAT, FORMAT_VERSION = "uniemox-release", 1
PROMISED = (
    *("run", "step", "slots", "parameters", "weights", "feature", "embedding_width", "teacher"),
    *("data_identity", "losses", "config"),
)
"""Fields of uniemox.json that every release of this format has."""
LOADED = ("*.safetensors", "*.json", "*.onnx")
"""What programs read of a release: never without a hash."""
SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._+-]+)")


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
    lacking = [name for name in PROMISED if name not in facts]
    if lacking:
        raise UserError(f"{field}={folder}: {FACTS} lacks {lacking[0]}; copy the release again")
    try:
        Config.model_validate(facts["config"])
    except ValidationError as error:
        raise UserError(
            f"{field}={folder}: {FACTS}: config: {next(explain(error, Config))} (written by uniemox-dist "
            f"{facts.get('uniemox_dist', '?')}); update uniemox-dist, or copy the release again"
        ) from None
    return dict(facts)


def altered(folder: Path) -> Iterator[tuple[str, str]]:
    """The files of a release that are not as SHA256SUMS says, and what is wrong with each; SHA256SUMS itself where it
    is damaged, or silent about a file that programs read."""
    # Every byte counts: whatever else breaks a line for Python (\v, \x1c, …) is damage here.
    lines = (folder / SUMS).read_bytes().decode("utf-8", "backslashreplace").split("\n")
    named = set()
    for line in lines[:-1] if not lines[-1] else lines:
        if not (match := SUM.fullmatch(line)):
            yield SUMS, f"has a line that is none of a release's: {line[:80]!r}"
            continue
        digest, name = match.groups()
        named.add(name)
        if not (folder / name).is_file():
            yield name, f"is missing, which {SUMS} names"
        elif sha256_file(folder / name) != digest:
            yield name, f"was altered (SHA-256 differs from {SUMS})"
    for path in sorted(path for pattern in LOADED for path in folder.glob(pattern)):
        if path.name not in named:
            yield SUMS, f"does not name {path.name}"


def check(path: Path) -> int:
    """Rechecks a release: hashes, that every weight is finite, and that all fit its settings, timm's and ours. Returns
    how many tensors there are.

    Raises:
        UserError: naming the first thing that is wrong.
    """
    from safetensors import safe_open

    from uniemox_dist.release.load import load_encoder, load_pretrained

    read_release(path, verify=True)
    load_encoder(path)
    load_pretrained(path)
    count = 0
    for file in (ENCODER, REST):
        with safe_open(path / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                count += 1
                if not tensors.get_tensor(name).isfinite().all():
                    raise UserError(f"RELEASE={path}: {file}: {name} is not finite; release another step")
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
    try:
        architecture = read_json(path / CONFIG)["architecture"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"RELEASE={path}: {CONFIG} names no architecture; copy the release again") from None
    rows["timm"] = f'timm.create_model("local-dir:{path}", pretrained=True, num_classes=0)  # {architecture}'
    return [f"{name:<11} {value}" for name, value in rows.items()]
