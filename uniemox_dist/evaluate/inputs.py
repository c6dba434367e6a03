"""The inputs of an evaluation: the splits of a data set, and encoders of timm. Torch-free."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from shards.format.manifest import MANIFEST
from shards.storage import parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate.intervals import LOOK_ALIKES

TIMM_PREFIX = "timm:"


def open_splits(data: str, names: Mapping[str, str | None], wanted: Sequence[str]) -> dict[str, ShardReader]:
    """The splits of a data set by role (train, val, test): DATA/NAME, or DATA itself as test if it is one data set.

    Args:
        names: folder of each role; None stands for the role's own name. A val split without a name is not opened.

    Raises:
        UserError: if a split is missing, or two roles have the same data set.
    """
    base = parse_place(data, "DATA")
    if (base / MANIFEST).is_file():
        if "train" in wanted:
            raise UserError(
                f"DATA={data}: is one data set; give the folder that holds train/ and test/ (`uniemox shards split` "
                "makes them)"
            )
        return {"test": ShardReader.from_folder(data, "DATA")}
    found = {
        role: ShardReader.from_folder(str(base / (names.get(role) or role)), "DATA")
        for role in wanted
        if role != "val" or names.get("val")
    }
    for role, other in combinations(found, 2):
        identity = found[role].manifest.identity
        if identity == found[other].manifest.identity:
            raise UserError(
                f"--{role}={names.get(role) or role} and --{other}={names.get(other) or other}: are the same data set "
                f"of DATA={data} ({identity[:12]}); a {other} split must hold samples that nothing was learned on"
            )
    return found


def check_group_attribute(readers: Mapping[str, ShardReader], attribute: str | None) -> None:
    """Checks that some sample has the attribute that names groups of look-alikes. The default one may be missing.

    Raises:
        UserError: naming the attributes that samples have.
    """
    if attribute in (None, LOOK_ALIKES):
        return
    have: set[str] = set()
    for reader in readers.values():
        for shard, count in enumerate(reader.counts):
            for record in reader.records(shard, range(count)):
                attributes = record.get("attributes")
                have.update(attributes if isinstance(attributes, dict) else ())
            if attribute in have:
                return
    known = ", ".join(sorted(have)) or "none at all"
    raise UserError(f"--group-by={attribute}: no sample has this attribute; samples have {known}")


def parse_timm(text: str) -> tuple[str, str]:
    """Parses `timm:NAME=FILE` to (NAME, FILE).

    Raises:
        UserError: if FILE is missing or not a safetensors file.
    """
    name, _, file = text.removeprefix(TIMM_PREFIX).partition("=")
    if not file.endswith(".safetensors") or not Path(file).is_file():
        raise UserError(
            f"{text}: {file or 'nothing'} is not a safetensors file; give timm:NAME=FILE.safetensors"
        )
    return name, file
