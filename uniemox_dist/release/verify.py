"""`uniemox release --verify` and `--inspect`: checks a release, and describes it."""

from pathlib import Path

from safetensors import safe_open

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import millions, size
from uniemox_dist.release.format import CONFIG, ENCODER, REST, read_release
from uniemox_dist.release.load import load_encoder, load_pretrained


def check(path: Path) -> int:
    """Checks a release: hashes, finite weights, and that weights fit the settings of timm and of this project. Returns
    the number of tensors.

    Raises:
        UserError: naming the first problem.
    """
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
    """The description of a release, in lines for a terminal."""
    facts = read_release(path)
    config, data, teacher = facts["config"], facts.get("data"), facts.get("teacher")
    model = config["model"]
    labels = (data or {}).get("labels") or []
    sizes = {p.name: p.stat().st_size for p in sorted(path.iterdir()) if p.is_file()}
    rows = {
        "run": f"{facts['run']}, step {facts['step']:,} ({facts['slots']:,} samples), {facts['weights']} weights",
        "encoder": f"{model.get('name') or 'ViT'}, {model['width']} wide, {model['depth']} blocks, patches of "
        f"{model['patch_size']} px in {model['image_size']} px, {millions(facts['parameters'])} parameters, "
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
        "files": ", ".join(f"{name} {size(count)}" for name, count in sizes.items() if count >= 50_000),
    }
    try:
        architecture = read_json(path / CONFIG)["architecture"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"RELEASE={path}: {CONFIG} names no architecture; copy the release again") from None
    rows["timm"] = f'timm.create_model("local-dir:{path}", pretrained=True, num_classes=0)  # {architecture}'
    return [f"{name:<11} {value}" for name, value in rows.items()]
