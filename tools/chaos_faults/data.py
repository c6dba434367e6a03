"""Shards that disappear or change while a run reads them."""

import shutil
import time
from pathlib import Path

from chaos_faults.kills import STEP
from chaos_faults.lab import Lab
from chaos_faults.verdict import Outcome, compare, finished, recovery, traced
from shards.format.index import index_path, read_index
from shards.format.manifest import read_manifest

LATER = 3
"""Steps between the fault and the first use of a shard, enough that no process has opened it yet."""


def unread_shard(lab: Lab, data: Path) -> tuple[str, int, dict[str, int]]:
    """A shard that is first read some steps after the fault: its name, the step, and the step of each of its keys."""
    steps = {
        str(key): step for rank in traced(lab.reference().path) for step, s in rank for key, *_ in s.values()
    }
    for shard in read_manifest(data).shards:
        keys = read_index(index_path(data, shard.name), ["key"])["key"].to_pylist()
        found = {key: steps[key] for key in keys if key in steps}
        if found and min(found.values()) > STEP + LATER:
            return shard.name, min(found.values()), found
    raise AssertionError("every shard was read by then")


def _own_shards(lab: Lab, name: str) -> Path:
    folder = lab.root / f"data-{name}"
    shutil.copytree(lab.root / "data" / "shards" / "train", folder)
    return folder


def gone(lab: Lab) -> Outcome:
    """A shard disappears in mid-run; it is put back after the run ended."""
    data = _own_shards(lab, "8a")
    shard, first, _ = unread_shard(lab, data)
    # The text embeddings are cached beside the shards and exist before the run begins.
    outcome, run = Outcome("8a"), lab.run("8a", "run.max_restarts=1", data=data).start()
    run.wait_for_step(STEP)
    when = time.time()
    (data / shard).rename(lab.root / shard)
    code = run.finish()
    outcome.expect(code in (1, 2), f"exit code {code} instead of 1 or 2")
    outcome.expect(shard in run.last_words() or run.says(f"shard {shard}"), f"no line names {shard}")
    noticed = run.noticed(when)
    outcome.notes.append(f"exit {code}; shard first needed at step {first}")
    (lab.root / shard).rename(data / shard)
    finished(outcome, run, run.start().finish())
    recovery(outcome, run, when)
    outcome.noticed_s = noticed
    if not outcome.problems:
        compare(outcome, run, lab.reference())
    return outcome


def altered(lab: Lab) -> Outcome:
    """Two pictures of a shard are altered in mid-run: they fail their hashes and are replaced."""
    data = _own_shards(lab, "8b")
    shard, _, steps = unread_shard(lab, data)
    victims = sorted(steps, key=lambda key: steps[key])[:2]
    outcome, run = Outcome("8b"), lab.run("8b", data=data).start()
    run.wait_for_step(STEP)
    when = time.time()
    index = read_index(index_path(data, shard), ["key", "image_offset"]).to_pylist()
    with open(data / shard, "r+b") as tar:
        for offset in (row["image_offset"] for row in index if row["key"] in victims):
            tar.seek(offset + 60)
            byte = tar.read(1)[0]
            tar.seek(offset + 60)
            tar.write(bytes([byte ^ 255]))
    finished(outcome, run, run.finish())
    recovery(outcome, run, when)
    told = [str(event["damaged"]) for event in run.events("fault", since=when) if "damaged" in event]
    for key in victims:
        outcome.expect(any(key in t and shard in t for t in told), f"no event names {shard} {key}")
    outcome.expect(len(told) == len(victims), f"{len(told)} replaced instead of {len(victims)}")
    outcome.expect(len(run.events("start")) == 1, "training was interrupted")
    outcome.notes.append(f"{len(told)} samples replaced and named")
    compare(outcome, run, lab.reference(), losses=False, replaced=frozenset(victims))
    return outcome
