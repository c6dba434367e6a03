"""How much the training data overlaps with the test splits of other data sets, for the model card."""

from pathlib import Path
from typing import Any

from shards.format.manifest import combined_identity, read_manifest
from shards.overlap.pairs import Overlap, read_pairs
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError

TEST_SPLITS = ("test", "testing")


def find_contamination(path: Path | None, config: Config, data_identity: str) -> list[dict[str, Any]] | None:
    """For every test split in a file of `shards overlap`: its samples, and how many of them have a near-copy in the
    training data. None without a file.

    Raises:
        UserError: if it cannot be read, the training data was not compared, or no test split was.
    """
    if path is None:
        return None
    overlap = read_pairs(path, "--overlap")
    training = _find_training_sets(overlap, path, config, data_identity)
    tests = [
        number
        for number, one in enumerate(overlap.sets)
        if one.split in TEST_SPLITS and number not in training
    ]
    if not tests:
        raise UserError(
            f"--overlap={path}: no test split was compared with the training data; run `uniemox shards overlap` "
            "with the training data and the benchmarks"
        )
    copied: dict[int, set[str]] = {number: set() for number in tests}
    for pair in overlap.pairs:
        for one, other in ((pair.kept, pair.copy), (pair.copy, pair.kept)):
            if one.set in copied and other.set in training:
                copied[one.set].add(one.key)
    return [
        {
            "name": overlap.sets[number].title,
            "identity": overlap.sets[number].identity,
            "samples": overlap.sets[number].samples,
            "with_near_copy": len(copied[number]),
        }
        for number in tests
    ]


def _find_training_sets(overlap: Overlap, path: Path, config: Config, data_identity: str) -> set[int]:
    origins = [origin.path for origin in config.data.origins()]
    try:
        identities = [read_manifest(url, "data.path").identity for url in origins]
    except (UserError, OSError):
        identities = []
    if not identities or combined_identity(identities) != data_identity:
        identities = [data_identity] if len(origins) == 1 else []
    if not identities:
        raise UserError(
            f"--overlap={path}: the data sets of the run are no longer at their paths, so they cannot be found in the "
            "file; leave --overlap out"
        )
    place = {one.identity: number for number, one in enumerate(overlap.sets)}
    for url, identity in zip(origins, identities):
        if identity not in place:
            raise UserError(
                f"--overlap={path}: the training data {url} was not compared; run `uniemox shards overlap` with it and "
                "the benchmarks"
            )
    return {place[identity] for identity in identities}
