"""A pack whose OUT is in an object store or another remote file system.

One shard at a time is written below TMPDIR, uploaded while the next one is packed, and deleted. `OUT/.partial/` holds
the plan and one small file for each complete shard, so that any machine can resume. It is deleted after the manifests
are written.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format.index import index_path
from shards.format.manifest import MANIFEST
from shards.pack.append import Existing, is_append
from shards.pack.journal import Step, describe_changes
from shards.pack.partial import INSIDE, PART, WORK, publishing_order
from shards.remote_folder import RemoteFolder, Stored, is_data_file, open_scratch
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json

_PLAN, _OWNER = f"{INSIDE}/plan.json", f"{INSIDE}/owner.json"
_STEP = f"{INSIDE}/step-"
SETTLE_S = 1.0
"""Seconds for which a process that takes over waits: one that has just finished then deletes its plan."""
_FINAL, _MOVING = f"{INSIDE}/final/", f"{INSIDE}/moving.json"


def is_taken(out: RemoteFolder) -> bool:
    """Whether OUT contains anything other than an interrupted pack of this command.

    Raises:
        UserError: if the store cannot be reached, or does not permit to write there.
    """
    names = out.list_files()
    is_packing = _PLAN in names and not is_append(read_plan(out))
    return not is_packing and not all(map(_is_inside, names))


def has_complete_shards(out: RemoteFolder) -> bool:
    """Whether an interrupted command left any."""
    return _has_steps(out.list_files())


def forget_steps(out: RemoteFolder) -> None:
    """Deletes what an interrupted command recorded, so that it is not continued."""
    out.delete([name for name in out.list_files() if name.startswith(_STEP)])


def read_plan(out: RemoteFolder) -> dict[str, Any] | None:
    """The plan of an interrupted command; None if there is none."""
    text = out.read(_PLAN)
    try:
        return None if text is None else dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


@contextmanager
def open_remote(out: RemoteFolder, resume: bool, *, appends: bool = False) -> Iterator[Path]:
    """Yields an empty local folder for the shards that are not uploaded yet; it is deleted at the end.

    Raises:
        UserError: if there is an interrupted pack and `resume` is false, the store does not permit to write, or the
            local disk is full.
    """
    if not resume and _has_steps(out.list_files()):
        raise UserError(
            f"OUT={out}: an interrupted pack is in {INSIDE}/; continue it with --resume, or delete "
            f"{_what_to_delete(appends)}"
        )
    out.check_access(f"{INSIDE}/access")
    with open_scratch() as local:
        (local / WORK).mkdir()
        yield local


class RemoteJournal:
    """The steps of a remote pack. `append` uploads a shard in the background, one at a time, and then records it."""

    def __init__(
        self, out: RemoteFolder, local: Path, plan: dict[str, Any], existing: Existing | None = None
    ) -> None:
        """Opens the journal in `OUT/.partial`, for shards that are written below `local`; `existing` is the finished
        data set to which they are appended.

        Raises:
            UserError: if it contains steps of another plan, they cannot be read, or another process has completed a
                data set there meanwhile.
        """
        self.shards = out.place
        """The folder of the complete shards."""
        self._out, self._local = out, local
        self._appends = existing is not None
        self._count = 0
        self._thread = ThreadPoolExecutor(1)
        self._uploading: Future[None] | None = None
        plan = json.loads(canonical_json(plan))
        self._owner = _describe_process()
        self._check_plan(out.list_files(), plan)
        self._found = self._take_over()
        self._check_plan(self._found, plan)
        self._resumes = _has_steps(self._found)
        out.write(_PLAN, canonical_json(plan))
        out.abort_uploads()

    @property
    def count(self) -> int:
        """Number of shards that are stored and recorded."""
        return self._count

    def steps(self) -> list[Step]:
        """The finished steps, up to the first that is unreadable or whose files have changed. Deletes all other files
        that a pack writes."""
        names = [_step_name(number) for number in range(len(self._found))]
        present = [name for name in names if name in self._found and self._resumes]
        contents = self._out.read_many(present)
        steps: list[Step] = []
        kept = {_PLAN, _OWNER}
        for name in names:
            if name not in contents:
                break
            record = json.loads(contents[name])
            step = Step.from_json(record["step"])
            if any(self._found.get(file) != Stored(*stored) for file, stored in record["files"].items()):
                break
            steps.append(step)
            kept |= {name, *record["files"]}
        # Other files beside a finished data set may belong to the user, such as those in quarantine/.
        is_ours = _is_inside if self._appends else is_data_file
        self._out.delete([name for name in self._found if name not in kept and is_ours(name)])
        self._count = len(steps)
        return steps

    def append(self, step: Step) -> None:
        """Starts to upload a shard; returns when the one before is stored and recorded.

        Raises:
            UserError: if another process has taken over the pack, or the store refuses.
            Fault: if the store does not answer any more.
        """
        self.wait()
        self._uploading = self._thread.submit(self._store, step)

    def wait(self) -> None:
        """Returns when all shards are stored and recorded."""
        if self._uploading is not None:
            pending, self._uploading = self._uploading, None
            pending.result()

    def publish(self) -> None:
        """Uploads what the pack wrote beside its shards: manifests after all other files, part.json last. Then deletes
        `.partial`."""
        self._check_owner()
        files = [path.relative_to(self._local) for path in self._local.rglob("*") if path.is_file()]
        files = [name for name in files if WORK not in name.parts]
        files.sort(key=lambda name: (name.name == PART, *publishing_order(name)))
        if self._appends:  # first beside the old manifests, so that a killed pack can be finished
            for name in files:
                self._out.upload(self._local / name, f"{_FINAL}{name.as_posix()}")
            self._check_owner()
            self._out.write(_MOVING, canonical_json([name.as_posix() for name in files]))
            finish_publishing(self._out)
            return
        for name in files:
            if name.name in (MANIFEST, PART):
                self._check_owner()
            self._out.upload(self._local / name, name.as_posix())
        self._check_owner()
        self._out.delete([_PLAN])  # from here on the pack is complete
        clear_leftovers(self._out)

    def discard(self) -> None:
        """Deletes `.partial` of a pack that has nothing to publish."""
        self._out.delete([_PLAN])
        clear_leftovers(self._out)

    def delete_all(self) -> None:
        """Deletes everything that was written to OUT, unless another process has taken over."""
        self._check_owner()
        self._out.delete([name for name in self._out.list_files() if is_data_file(name)])

    def _check_plan(self, found: Iterable[str], plan: dict[str, Any]) -> None:
        """
        Raises:
            UserError: if there are steps of another plan.
        """
        if _has_steps(found) and (changes := describe_changes(self._read_plan(), plan)):
            raise UserError(
                f"OUT={self._out}: an interrupted pack cannot resume: {changes}; use its original settings and "
                f"source, or delete {_what_to_delete(self._appends)}"
            )

    def _take_over(self) -> dict[str, Stored]:
        """Makes this process the only one that writes to OUT; others end when they check. Returns the files of OUT.

        Raises:
            UserError: if another process has completed a data set there, or takes over itself.
        """
        is_new = self._out.read(_OWNER) is None
        self._out.write(_OWNER, canonical_json(self._owner))
        if not is_new:
            time.sleep(SETTLE_S)
        self._check_owner()
        found = self._out.list_files()
        if not self._appends and _PLAN not in found and not all(map(_is_inside, found)):
            self._out.delete([_OWNER])
            raise UserError(
                f"OUT={self._out}: another process has completed a data set there meanwhile; give another folder, or "
                "keep it"
            )
        return found

    def _store(self, step: Step) -> None:
        self._check_owner()
        folder = self._local / step.split
        paths = [folder / step.entry.name, index_path(folder, step.entry.name)]
        names = [path.relative_to(self._local).as_posix() for path in paths]
        for path, name in zip(paths, names):
            self._out.upload(path, name)
        found = self._out.stat(names)
        record = {"step": step.to_json(), "files": {name: [*vars(found[name]).values()] for name in names}}
        self._out.write(_step_name(self._count), canonical_json(record))
        self._count += 1
        for path in paths:
            path.unlink()

    def _check_owner(self) -> None:
        """
        Raises:
            UserError: if another process has started to write into OUT since this one did.
        """
        owner = self._out.read(_OWNER)
        if owner != canonical_json(self._owner):
            other = "another process"
            if owner is not None:
                facts = json.loads(owner)
                other = f"process {facts.get('pid')} on {facts.get('host')}"
            raise UserError(f"OUT={self._out}: {other} has started to write into it; this one ends")

    def _read_plan(self) -> dict[str, Any]:
        try:
            plan = json.loads(self._out.read(_PLAN) or b"")
            return {**plan, "settings": {**plan["settings"]}}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"OUT={self._out}: an interrupted pack cannot resume: its {_PLAN} is missing or damaged; delete "
                f"{_what_to_delete(self._appends)} and start again"
            ) from None


def finish_publishing(out: RemoteFolder) -> None:
    """Replaces the manifests of a data set to which a pack was appended, if that pack has begun to."""
    listed = out.read(_MOVING)
    if listed is None:
        return
    for name in json.loads(listed):
        out.copy(out.place / f"{_FINAL}{name}", name)
    for name in (_PLAN, _MOVING):  # in this order, before the files that the second one lists
        out.delete([name])
    clear_leftovers(out)


def clear_leftovers(out: RemoteFolder) -> None:
    """Deletes what a pack left in `.partial` that was killed after it was complete."""
    out.delete([name for name in out.list_files() if name.startswith(f"{INSIDE}/")])


def _step_name(number: int) -> str:
    return f"{_STEP}{number:06d}.json"


def _is_inside(name: str) -> bool:
    return name.startswith(f"{INSIDE}/")


def _what_to_delete(appends: bool) -> str:
    return f"{INSIDE}/" if appends else "all of OUT"


def _has_steps(names: Iterable[str]) -> bool:
    """Whether an interrupted pack left any complete shard. One that was complete has no plan any more."""
    names = set(names)
    return _PLAN in names and any(name.startswith(_STEP) for name in names)


def _describe_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
