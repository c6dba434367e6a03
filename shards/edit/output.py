"""The data set that a command makes out of others, on disk or on a store: it appears as a whole, or manifests last."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.edit.links import link_file, publish_on_success
from shards.pack.partial import INSIDE, publishing_order
from shards.remote_folder import RemoteFolder, is_data_file, open_remote_folder, open_scratch
from shards.storage import Place, is_local
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json

_MARKER = f"{INSIDE}/building.json"
"""Exists on a store while a command writes there."""
_AT_ONCE, _WAITING = 4, 16
"""Copies at a time, and copies that wait."""


class Output:
    """A folder on disk that becomes OUT. Names are relative to it, with `/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """A local folder; files that are written there become part of OUT."""

    def add(self, source: Place, name: str) -> None:
        """Makes a finished file of another data set a part of OUT: by a link on disk, otherwise by a copy."""
        if is_local(source):
            link_file(source, self.folder / name)
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            RemoteFolder(source.parent, "PARTS", is_reached=True).download(source.name, self.folder / name)

    def finish(self, names: list[str]) -> None:
        """Stores files that were written below `folder` and are complete; their local copies may disappear."""


class RemoteOutput(Output):
    """A folder of a store. `folder` is below TMPDIR, and holds only what is not uploaded yet."""

    def __init__(self, out: RemoteFolder, folder: Path) -> None:
        super().__init__(folder)
        self._out = out
        self._threads = ThreadPoolExecutor(_AT_ONCE)
        self._copies: list[Future[None]] = []
        self._uploading: Future[None] | None = None

    def add(self, source: Place, name: str) -> None:
        """As `Output.add`. Within one store no data pass through this machine. Copies run in the background."""
        self._copies.append(self._threads.submit(self._out.copy, source, name))
        while len(self._copies) > _WAITING:
            self._copies.pop(0).result()

    def finish(self, names: list[str]) -> None:
        """As `Output.finish`. Uploads in the background, the files of one call at a time."""
        if self._uploading is not None:
            self._uploading.result()
        self._uploading = self._threads.submit(self._upload, names)

    def _upload(self, names: list[str]) -> None:
        for name in names:
            self._out.upload(self.folder / name, name)
            (self.folder / name).unlink()

    def publish(self) -> None:
        """Uploads all remaining files, manifests last."""
        for copy in [*self._copies, *([self._uploading] if self._uploading is not None else [])]:
            copy.result()
        names = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        self._upload([name.as_posix() for name in sorted(names, key=publishing_order)])
        self._out.delete([_MARKER])

    def cancel(self) -> None:
        """Waits for running copies, and drops the others."""
        self._threads.shutdown(cancel_futures=True)


@contextmanager
def open_output(out: Place) -> Iterator[Output]:
    """Yields an output that becomes `out` on success, and of which nothing stays otherwise. On a store, files that a
    killed command left are deleted.

    Raises:
        UserError: if `out` exists and is not empty, or cannot be written.
    """
    if is_local(out):
        with publish_on_success(out) as folder:
            yield Output(folder)
        return
    remote = open_remote_folder(out)
    found = remote.list_files()
    if found and _MARKER not in found:
        raise UserError(f"OUT={remote}: exists; give another folder, or delete it")
    remote.check_access(f"{INSIDE}/access")
    remote.delete([name for name in found if is_data_file(name)])
    remote.write(_MARKER, canonical_json({}))
    with open_scratch() as folder:
        output = RemoteOutput(remote, folder)
        try:
            yield output
            output.publish()
        except BaseException:
            output.cancel()
            with suppress(Exception):  # the first error is the one to report
                remote.delete([name for name in remote.list_files() if is_data_file(name)])
            raise
