"""A pack whose OUT is in an object store or another remote file system.

One shard at a time is written below TMPDIR, uploaded while the next one is packed, and deleted. `OUT/.partial/` holds
the plan and one small file for each complete shard, so that any machine can resume. It is deleted after the manifests
are written.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format.index import index_path
from shards.format.manifest import MANIFEST, SIZES
from shards.format.rejected import REJECTED
from shards.pack.journal import Step, describe_changes
from shards.pack.partial import INSIDE, NO_SPACE, PART, WORK
from shards.remote_folder import RemoteFolder, Stored
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json

_PLAN, _OWNER = f"{INSIDE}/plan.json", f"{INSIDE}/owner.json"
_OURS = re.compile(
    rf"{re.escape(INSIDE)}/.*|([^/]+/)?(([^/]*-)?\d{{6,}}\.tar|index/([^/]*-)?\d{{6,}}\.parquet|{MANIFEST}|{SIZES})"
    rf"|{REJECTED}|{PART}"
)
"""Names of files that a pack writes below OUT."""
_LOCAL = "uniemox-pack-"
"""Beginning of the name of the working folders below TMPDIR."""


def is_taken(out: RemoteFolder) -> bool:
    """Whether OUT contains anything other than an interrupted pack of this command.

    Raises:
        UserError: if the store cannot be reached, or does not permit to write there.
    """
    names = out.list_files()
    return _PLAN not in names and any(not name.startswith(f"{INSIDE}/") for name in names)


@contextmanager
def open_remote(out: RemoteFolder, resume: bool) -> Iterator[Path]:
    """Yields an empty local folder for the shards that are not uploaded yet; it is deleted at the end.

    Raises:
        UserError: if there is an interrupted pack and `resume` is false, the store does not permit to write, or the
            local disk is full.
    """
    if not resume and any(_is_step(name) for name in out.list_files()):
        raise UserError(
            f"OUT={out}: an interrupted pack is in {INSIDE}/; continue it with --resume, or delete all of OUT"
        )
    out.check_access(f"{INSIDE}/access")
    _delete_abandoned()
    local = Path(tempfile.mkdtemp(prefix=_LOCAL))
    try:
        (local / WORK).mkdir()
        with open(local / WORK / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield local
    except OSError as error:
        if error.errno in NO_SPACE:
            raise UserError(
                f"TMPDIR={tempfile.gettempdir()}: {error.strerror}; complete shards are in OUT={out}; set TMPDIR to a "
                "folder with space for two shards, then continue with the same command and --resume"
            ) from None
        raise
    finally:
        shutil.rmtree(local, ignore_errors=True)


def _delete_abandoned() -> None:
    """Deletes working folders of killed processes of this user: their locks are free."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_LOCAL}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / WORK / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or just being made
            continue


class RemoteJournal:
    """The steps of a remote pack. `append` uploads a shard in the background, one at a time, and then records it."""

    def __init__(self, out: RemoteFolder, local: Path, plan: dict[str, Any]) -> None:
        """Opens the journal in `OUT/.partial`, for shards that are written below `local`.

        Raises:
            UserError: if it contains steps of another plan, or they cannot be read.
        """
        self.shards = out.place
        """The folder of the complete shards."""
        self._out, self._local = out, local
        self._count = 0
        self._thread = ThreadPoolExecutor(1)
        self._uploading: Future[None] | None = None
        self._found = out.list_files()
        plan = json.loads(canonical_json(plan))
        if any(map(_is_step, self._found)) and (changes := describe_changes(self._read_plan(), plan)):
            raise UserError(
                f"OUT={out}: an interrupted pack cannot resume: {changes}; use its original settings and source, or "
                "delete all of OUT"
            )
        self._owner = _describe_process()
        out.write(_OWNER, canonical_json(self._owner))
        out.write(_PLAN, canonical_json(plan))
        out.abort_uploads()

    def steps(self) -> list[Step]:
        """The finished steps, up to the first that is unreadable or whose files have changed. Deletes all other files
        that a pack writes."""
        names = [_step_name(number) for number in range(len(self._found))]
        present = [name for name in names if name in self._found]
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
        self._out.delete([name for name in self._found if name not in kept and _OURS.fullmatch(name)])
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
        files = [path for path in self._local.rglob("*") if path.is_file()]
        files = [path for path in files if WORK not in path.relative_to(self._local).parts]
        for path in sorted(files, key=lambda path: (path.name == PART, path.name == MANIFEST, str(path))):
            self._out.upload(path, path.relative_to(self._local).as_posix())
        self._out.delete([_PLAN])  # from here on the pack is complete
        clear_leftovers(self._out)

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
            UserError: if another process has started to pack into OUT since this one did.
        """
        owner = self._out.read(_OWNER)
        if owner != canonical_json(self._owner):
            other = "another process"
            if owner is not None:
                facts = json.loads(owner)
                other = f"process {facts.get('pid')} on {facts.get('host')}"
            raise UserError(f"OUT={self._out}: {other} has started to pack into it; this one ends")

    def _read_plan(self) -> dict[str, Any]:
        try:
            plan = json.loads(self._out.read(_PLAN) or b"")
            return {**plan, "settings": {**plan["settings"]}}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"OUT={self._out}: an interrupted pack cannot resume: its {_PLAN} is missing or damaged; delete all of "
                "OUT and pack again"
            ) from None


def clear_leftovers(out: RemoteFolder) -> None:
    """Deletes what a pack left in `.partial` that was killed after it was complete."""
    out.delete([name for name in out.list_files() if name.startswith(f"{INSIDE}/")])


def _step_name(number: int) -> str:
    return f"{INSIDE}/step-{number:06d}.json"


def _is_step(name: str) -> bool:
    return name.startswith(f"{INSIDE}/step-")


def _describe_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
