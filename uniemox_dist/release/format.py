"""The format of a release: its files, the fields of uniemox.json, and the check of its hashes. Torch-free."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uniemox_dist.checkpoints.folders import find_checkpoint
from uniemox_dist.config.finetune import CLASSIFIER
from uniemox_dist.config.schema import Config
from uniemox_dist.config.sections import explain_errors
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import describe_missing_folder, read_json, sha256_file

ENCODER, REST = "model.safetensors", "uniemox.safetensors"
CONFIG, FACTS, CARD, SUMS, ONNX = "config.json", "uniemox.json", "README.md", "SHA256SUMS", "encoder.onnx"
FORMAT, FORMAT_VERSION = "uniemox-release", 1
PROMISED = (
    *("run", "step", "slots", "parameters", "weights", "feature", "embedding_width", "teacher"),
    *("data_identity", "losses", "config"),
)
"""Fields of uniemox.json in every release of this format."""
LOADED = ("*.safetensors", "*.json", "*.onnx")
"""Files of a release that programs read; SHA256SUMS must list each."""
SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._+-]+)")


def read_release(path: str | Path, *, verify: bool = False, field: str = "RELEASE") -> dict[str, Any]:
    """Checks that a folder is a release that this version reads. Returns the contents of uniemox.json.

    Raises:
        UserError: if the folder is not a release, or (with verify) a file was altered.
    """
    folder = Path(path)
    if not folder.is_dir():
        problem = describe_missing_folder(folder)
        raise UserError(f"{field}={folder}: {problem}; give a folder that `uniemox release RUN OUT` wrote")
    check_not_classifier(folder, field)
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
        for name, problem in list_altered(folder):
            raise UserError(f"{field}={folder}: {name} {problem}; copy the release again")
    lacking = [name for name in PROMISED if name not in facts]
    if lacking:
        raise UserError(f"{field}={folder}: {FACTS} lacks {lacking[0]}; copy the release again")
    try:
        Config.model_validate(facts["config"])
    except ValidationError as error:
        raise UserError(
            f"{field}={folder}: {FACTS}: config: {next(explain_errors(error, Config))} (written by uniemox-dist "
            f"{facts.get('uniemox_dist', '?')}); update uniemox-dist, or copy the release again"
        ) from None
    return dict(facts)


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a classifier that `uniemox finetune` wrote."""
    try:
        return bool(read_json(folder / FACTS).get("format") == CLASSIFIER)
    except (OSError, ValueError, AttributeError):
        return False


def check_not_classifier(folder: Path, field: str) -> None:
    """
    Raises:
        UserError: for a classifier, with the commands that read one.
    """
    if is_classifier(folder):
        raise UserError(
            f"{field}={folder}: is a fine-tuned classifier, not a release; `uniemox predict {folder} INPUT` reads it, "
            f'and timm.create_model("local-dir:{folder}", pretrained=True)'
        )


def check_run(run: Path) -> None:
    """Checks that a path is a pretraining run's folder, or one of its checkpoints, with a complete checkpoint.

    Raises:
        UserError: if it is not.
    """
    check_not_classifier(run, "RUN")
    if (run / FACTS).is_file():
        raise UserError(
            f"RUN={run}: is a release; give the folder of a run, or --inspect to describe the release"
        )
    if "finetune" in find_checkpoint(run, "RUN").info.get("config", {}):
        raise UserError(
            f"RUN={run}: is a fine-tuning run; its best weights are in {run}/best, and timm loads that folder"
        )


def list_altered(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the files of a release that differ from SHA256SUMS, with the problem of each; and SHA256SUMS itself if it
    is damaged, or does not list a file that programs read."""
    # Only
    # ends a line; other line breaks of Python's splitlines (\v, \x1c, …) count as damage.
    lines = (folder / SUMS).read_bytes().decode("utf-8", "backslashreplace").split("\n")
    named = set()
    for line in lines[:-1] if not lines[-1] else lines:
        if not (match := SUM.fullmatch(line)):
            yield SUMS, f"has an invalid line: {line[:80]!r}"
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
