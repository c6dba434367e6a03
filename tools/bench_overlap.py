"""Measures `uniemox shards overlap`.

PICTURES (a folder) gives recall and false positives. The pictures are packed, and near-copies among them are searched
by the command's own code; whether the pairs are real near-copies has to be judged by eye (--page FILE). Then some of
them are changed, and each changed copy goes through the same steps: its fingerprint must bring the original among its
best candidates out of all pictures, and the comparison of pixels must accept the pair.

--index N measures time and memory of the candidate search with N made-up fingerprints in the real format. A part
of the rows is assigned to landmarks, and some landmarks are compared; the rest of the time is extrapolated. All memory
is used as in a real search.
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmark import make_parser, print_markdown, run_main, save_results
from options import local_path, positive_int
from overlap_edits import EDITS, apply, encode
from PIL import Image

from shards.format.index import read_shard_rows
from shards.format.manifest import read_manifest
from shards.overlap import candidates
from shards.overlap.compare import compare, prepare
from shards.overlap.find import find_pairs, open_sets
from shards.overlap.fingerprint import MIRROR, WIDTH, WINDOWS, Fingerprint
from shards.overlap.page import write_page
from shards.overlap.pairs import Overlap
from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings
from shards.pictures.decode import decode_picture
from shards.storage import read_range

MADE_UP = 100_000
LARGE = 64
"""Copies with a shorter side below this are listed apart: little is left of the picture."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "pictures", nargs="?", type=folder, metavar="PICTURES", help="folder of pictures, any depth"
    )
    parser.add_argument("--copied", type=positive_int, default=300, help="originals of which copies are made")
    parser.add_argument(
        "--only-recall", action="store_true", help="do not search for pairs among the originals"
    )
    parser.add_argument("--workers", type=positive_int, default=1)
    parser.add_argument("--page", type=local_path, help="page of the pairs among the originals")
    parser.add_argument(
        "--index", type=positive_int, metavar="N", help="measure the index with N made-up pictures"
    )
    parser.add_argument("--landmarks", type=positive_int, default=40, help="landmarks that --index measures")
    parser.add_argument("--assigned", type=positive_int, default=1_000_000, help="rows that --index assigns")
    options = parser.parse_args()
    if (options.pictures is None) == (options.index is None):
        parser.error("give PICTURES or --index N")
    results = measure_index(options) if options.index else measure_pictures(options)
    save_results(options, results)


def folder(text: str) -> Path:
    """A folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder; give a folder of pictures")
    return Path(text)


def measure_pictures(options: argparse.Namespace) -> dict[str, Any]:
    """Recall for each edit, and the pairs among the originals."""
    if options.only_recall:
        paths = sorted(path for path in options.pictures.rglob("*") if path.is_file())
        return _print_recall([path.read_bytes() for path in paths], options.copied)
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch, "packed")
        settings = PackSettings(str(options.pictures.absolute()), "folder", persons="none")
        pack(settings, packed, workers=options.workers)
        sets = open_sets([packed])
        before = time.process_time() + _children_s()
        found = find_pairs(sets, workers=options.workers, scratch=Path(scratch))
        cpu_s = time.process_time() + _children_s() - before
        if options.page:
            write_page(options.page, Overlap(tuple(found.sets), tuple(found.pairs)), [packed])
        originals = list(_read_pictures(packed))
    samples = len(originals)
    pairs = samples * (samples - 1) // 2
    print(
        f"{samples} originals, {pairs} pairs: {found.candidates} candidates, {len(found.pairs)} near-copies reported"
    )
    print(f"{1000 * cpu_s / samples:.1f} ms of CPU for each picture\n")
    return {
        "originals": samples,
        "pairs": pairs,
        "candidates": found.candidates,
        "reported": [[p.kept.key, p.copy.key, p.kind, round(p.score, 3)] for p in found.pairs],
        "cpu_ms_per_picture": round(1000 * cpu_s / samples, 2),
        **_print_recall(originals, options.copied),
    }


def _print_recall(originals: list[bytes], copied: int) -> dict[str, Any]:
    recall = measure_recall(originals, copied)
    rows = [
        [edit, _share(row["found"], row["of"]), _share(row["found_64"], row["of_64"]), row["kinds"]]
        for edit, row in recall.items()
    ]
    print_markdown(
        ["change", "found", f"found, copies of at least {LARGE} pixels", "most common kinds"], rows
    )
    return {"recall": recall}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _read_pictures(packed: Path) -> Iterator[bytes]:
    for entry in read_manifest(packed).shards:
        table = read_shard_rows(packed, entry, ["image_offset", "image_length"])
        for row in table.to_pylist():
            yield read_range(packed / entry.name, row["image_offset"], row["image_length"])


def measure_recall(originals: list[bytes], copied: int) -> dict[str, Any]:
    """For each edit: how many of the copies of some originals are found."""
    prints = [prepare(data).fingerprint for data in originals]
    values_RW = candidates.unit(np.concatenate([one.values_FW for one in prints]))
    owner_R = np.repeat(np.arange(len(prints)), [len(one.values_FW) for one in prints])
    recall: dict[str, Any] = {}
    chosen = random.Random(0).sample(range(len(originals)), min(copied, len(originals)))
    for edit in EDITS:
        hits, kinds, large = [], Counter[str](), []
        for number in chosen:
            picture = Image.fromarray(decode_picture(originals[number]))
            copy = apply(edit, picture, str(number))
            after = prepare(encode(copy))
            relation = None
            if _is_candidate(after.fingerprint, number, values_RW, owner_R):
                relation = compare(prepare(originals[number]), after)
            hits.append(relation is not None)
            large.append(min(copy.size) >= LARGE)
            if relation is not None:
                kinds[relation.kind] += 1
        recall[edit] = {
            "found": sum(hits),
            "of": len(hits),
            "found_64": sum(hit for hit, is_large in zip(hits, large) if is_large),
            "of_64": sum(large),
            "kinds": ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(3)),
        }
    return recall


def _is_candidate(copy: Fingerprint, original: int, values_RW: np.ndarray, owner_R: np.ndarray) -> bool:
    """Whether the original is among the best candidates of a copy, out of all originals."""
    if not copy.wholes:
        return False
    values = candidates.unit(copy.values_FW[: copy.wholes])
    near_R = np.maximum(values @ values_RW.T, (values * MIRROR) @ values_RW.T).max(0)
    near_N = np.full(owner_R[-1] + 1, -1.0)
    np.maximum.at(near_N, owner_R, near_R)
    better = int((near_N > near_N[original]).sum())
    return bool(near_N[original] >= candidates.LEAST_SIMILARITY) and better < candidates.CANDIDATES


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not of:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.975)
    share = count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{100 * count / max(1, of):.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {of}"


def measure_index(options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of the candidate search for made-up fingerprints."""
    frames = 1 + len(WINDOWS)
    count = options.index * frames
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        path = Path(scratch, "values")
        with open(path, "wb") as file:
            once = _made_up(min(MADE_UP, options.index), frames, rng)
            for start in range(0, options.index, MADE_UP):
                signs = rng.choice(np.array([-1, 1], np.int8), WIDTH)  # other pictures of the same spectrum
                (once[: (options.index - start) * frames] * signs).tofile(file)
        values_RW = np.memmap(path, np.int8, "r").reshape(-1, WIDTH)
        rows = candidates.FingerprintRows(
            values_RW,
            np.repeat(np.arange(options.index, dtype=np.int32), frames),
            np.tile(np.arange(frames) == 0, options.index),
        )
        started = time.process_time()
        measured = candidates.measure_part(rows, options.index, options.landmarks, options.assigned)
        measured["cpu_s_measured"] = round(time.process_time() - started, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    results = {"pictures": options.index, "rows": count, "peak_rss_gb": round(peak, 2), **measured}
    for name, value in results.items():
        print(f"{name}: {value}")
    return results


def _made_up(pictures: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Fingerprints of pictures with the spectrum of photographs: amplitudes fall with the frequency, and the windows of
    a picture are similar to the whole."""
    k = np.arange(8)
    frequency = np.hypot(k[:, None], k[None]).ravel()[1:]
    whole = rng.standard_normal((pictures, 1, WIDTH)) * frequency**-1.1
    values = whole + 0.25 * rng.standard_normal((pictures, frames, WIDTH)) * frequency**-1.1 * (
        np.arange(frames) > 0
    ).reshape(1, -1, 1)
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    return np.round(values * 127).astype(np.int8).reshape(-1, WIDTH)


if __name__ == "__main__":
    run_main(main)
