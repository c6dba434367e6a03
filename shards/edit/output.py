"""The data set that a command makes out of others, on disk or on a store: it appears as a whole, or manifests last.

It is written as `shards pack` writes: into a partial folder, with a journal of complete shards. If a command is killed,
the same one continues after them; another one, or one without complete shards, starts again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.edit.links import link_file
from shards.format.entries import ShardEntry
from shards.pack import partial
from shards.pack import remote as remote_pack
from shards.pack.journal import Journal, Step
from shards.pack.remote import RemoteJournal
from shards.remote_folder import RemoteFolder, open_remote_folder
from shards.storage import Place, is_local
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, hide_secrets, sha256_bytes

Note = Callable[[str], None]
"""Receives a line for the user."""


def ignore(line: str) -> None:
    """Drops a line for the user."""


_AGAIN = "start the same command again"
_AT_ONCE, _WAITING = 4, 16
"""Copies at a time, and copies that wait."""


class Output:
    """A folder on disk that becomes OUT. Names are relative to it, with `/`."""

    def __init__(self, folder: Path, journal: Journal | RemoteJournal) -> None:
        self.folder = folder
        """A local folder; files that are written there become part of OUT."""
        self.journal = journal
        self.steps = journal.steps()
        """The complete shards of an interrupted command, by which this one is shorter."""

    @property
    def complete(self) -> dict[str, list[ShardEntry]]:
        """Those shards, by split."""
        names = dict.fromkeys(step.split for step in self.steps)
        return {name: [step.entry for step in self.steps if step.split == name] for name in names}

    def add(self, source: Place, name: str) -> None:
        """Makes a finished file of another data set a part of OUT: by a link on disk, otherwise by a copy."""
        if is_local(source):
            link_file(source, self.folder / name)
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            RemoteFolder(source.parent, "PARTS", is_reached=True).download(source.name, self.folder / name)

    def finish(self, names: list[str]) -> None:
        """Stores files that were written below `folder` and are complete; their local copies may disappear."""

    def finish_shard(self, split: str, entry: ShardEntry, samples: int) -> None:
        """Stores and records a shard and its index, which were written below `folder`. `samples` is the number of
        samples in this split so far."""
        self.journal.append(Step(split, entry, samples, []))


class RemoteOutput(Output):
    """A folder of a store. `folder` is below TMPDIR, and holds only what is not uploaded yet."""

    journal: RemoteJournal

    def __init__(self, out: RemoteFolder, folder: Path, journal: RemoteJournal) -> None:
        super().__init__(folder, journal)
        self._out = out
        self._threads = ThreadPoolExecutor(_AT_ONCE)
        self._copies: list[Future[None]] = []

    def add(self, source: Place, name: str) -> None:
        """As `Output.add`. Within one store no data pass through this machine. Copies run in the background."""
        self._copies.append(self._threads.submit(self._out.copy, source, name))
        while len(self._copies) > _WAITING:
            self._copies.pop(0).result()

    def finish(self, names: list[str]) -> None:
        """As `Output.finish`."""
        for name in names:
            self._out.upload(self.folder / name, name)
            (self.folder / name).unlink()

    def publish(self) -> None:
        """Uploads all remaining files, manifests last."""
        for copy in self._copies:
            copy.result()
        self.journal.wait()
        self.journal.publish()

    def cancel(self) -> None:
        """Waits for running copies and uploads, and drops the others."""
        self._threads.shutdown(cancel_futures=True)
        with suppress(Exception):  # the first error is the one to report
            self.journal.wait()


@contextmanager
def open_output(
    out: Place, command: str, settings: dict[str, Any], source: Any, note: Note
) -> Iterator[Output]:
    """Yields an output that becomes `out` on success. After a user error nothing of it stays; after another error, or
    a kill, the complete shards do.

    Args:
        out: a folder that does not exist or is empty.
        command: the name of the subcommand of `shards`.
        settings: its settings.
        source: with the settings, the JSON value that determines all bytes.
        note: receives a line if there are remains of an interrupted command.

    Raises:
        UserError: if `out` exists and is not empty, an interrupted pack is there, or it cannot be written.
    """
    plan = {
        "command": command,
        "settings": settings,
        "part": None,
        "source_sha256": sha256_bytes(canonical_json(source)),
    }
    with _open_local(out, plan, note) if is_local(out) else _open_remote(out, plan, note) as output:
        yield output


@contextmanager
def _open_local(out: Path, plan: dict[str, Any], note: Note) -> Iterator[Output]:
    found = partial.read_plan(out)
    if found == plan:
        partial.undo_publishing(out)
    if partial.is_taken(out):
        partial.finish_publishing(out)
        raise UserError(f"OUT={out}: exists; give another folder, or delete it")
    has_shards = partial.has_complete_shards(out)
    _check_command(out, found, has_shards)
    with partial.open_partial(out, resume=True, again=_AGAIN) as folder:
        if has_shards and found != plan:
            partial.clear_partial(folder)
        output = Output(folder, Journal(folder / partial.WORK, plan))
        partial.delete_leftovers(folder, output.complete)
        _describe_remains(out, found, plan, output, note)
        try:
            yield output
            partial.publish(folder, out)
        except UserError:
            partial.clear_partial(folder)
            raise


@contextmanager
def _open_remote(out: Place, plan: dict[str, Any], note: Note) -> Iterator[Output]:
    remote = open_remote_folder(out, again=_AGAIN)
    if remote_pack.is_taken(remote):
        if remote_pack.read_plan(remote) is None:
            remote_pack.clear_leftovers(remote)
        raise UserError(f"OUT={remote}: exists; give another folder, or delete it")
    found, has_shards = remote_pack.read_plan(remote), remote_pack.has_complete_shards(remote)
    _check_command(remote, found, has_shards)
    with remote_pack.open_remote(remote, resume=True) as folder:
        if has_shards and found != plan:
            remote_pack.forget_steps(remote)
        output = RemoteOutput(remote, folder, RemoteJournal(remote, folder, plan))
        _describe_remains(remote, found, plan, output, note)
        try:
            yield output
            output.publish()
        except BaseException as error:
            output.cancel()
            if isinstance(error, UserError) or not output.journal.count:
                with suppress(Exception):  # the first error is the one to report
                    output.journal.delete_all()
            raise


def _check_command(out: Place | RemoteFolder, found: dict[str, Any] | None, has_shards: bool) -> None:
    """
    Raises:
        UserError: if an interrupted pack is at `out`.
    """
    if has_shards and found is not None and "command" not in found:
        raise UserError(
            f"OUT={out}: an interrupted pack is there; finish it with `shards pack --resume`, delete it, or give "
            "another folder"
        )


def _describe_remains(
    out: Place | RemoteFolder, found: dict[str, Any] | None, plan: dict[str, Any], output: Output, note: Note
) -> None:
    """Reports what an interrupted command left, and what becomes of it."""
    if output.steps:
        samples = sum(step.entry.samples for step in output.steps)
        note(
            f"{hide_secrets(str(out))}: continues an interrupted `shards {plan['command']}`; {len(output.steps)} "
            f"shards with {samples} samples are complete"
        )
    elif found is not None:
        note(
            f"{hide_secrets(str(out))}: an interrupted `shards {found.get('command', 'pack')}` left nothing of use; "
            "starts again"
        )
