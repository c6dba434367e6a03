"""Types of arguments and options that name files and folders. They are checked when a command line is parsed: before
slow imports, and before `uniemox launch` submits the command as a job."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

UNSEEN = "uniemox.unseen"
"""Key of a context's `meta`: True if this machine does not see the inputs, or an earlier job has yet to write them.
They are not checked then."""


class Checked(click.Command):
    """A command with a check of its inputs that needs no torch; `uniemox launch` calls it before it submits a job."""

    def __init__(self, *arguments: Any, check: Callable[[click.Context], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.check = check


class _Named(click.ParamType):
    """A path. Errors name the argument or option as the user writes it."""

    def __init__(self, fix: str = "") -> None:
        self.fix = fix

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from uniemox_dist.core.errors import UserError

        field = _field(param)
        if str(value) == "":
            raise UserError(f"{field} is empty; {self.fix or 'give a path'}")
        return self.check(str(value), field, seen=ctx is None or not ctx.meta.get(UNSEEN))

    def check(self, text: str, field: str, *, seen: bool) -> Any:
        """Returns the path, or the text for an input that may be remote.

        Args:
            seen: whether this machine sees the input.

        Raises:
            UserError: naming field, value and fix.
        """
        raise NotImplementedError


class InputFile(_Named):
    """A local file that exists; `fix` names what writes it."""

    name = "file"

    def check(self, text: str, field: str, *, seen: bool) -> Path:
        """As `_Named.check`."""
        from uniemox_dist.core.errors import UserError

        path = Path(text)
        if seen and not path.is_file():
            problem = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"{field}={text}: {problem}; {self.fix}")
        return path


class InputPath(_Named):
    """A local file or folder that exists, or an URL, as a text."""

    name = "path"

    def check(self, text: str, field: str, *, seen: bool) -> str:
        """As `_Named.check`."""
        from shards.storage import is_local, parse_place
        from uniemox_dist.core.errors import UserError

        where = parse_place(text, field)
        if seen and is_local(where) and not where.exists():
            raise UserError(f"{field}={text}: no such file or folder; {self.fix}")
        return text


class OutputFile(_Named):
    """A local file that can be written; `suffix` is the required ending of its name."""

    name = "file"

    def __init__(self, suffix: str = "") -> None:
        super().__init__("give a file")
        self.suffix = suffix

    def check(self, text: str, field: str, *, seen: bool) -> Path:
        """As `_Named.check`."""
        from uniemox_dist.core.files import check_output, require_local

        path = Path(require_local(text, field))
        if seen:
            check_output(path, field, self.suffix)
        return path


class OutputPlace(_Named):
    """A file or folder to write, local or on a store; the command checks it."""

    name = "place"

    def __init__(self) -> None:
        super().__init__("give a place")

    def check(self, text: str, field: str, *, seen: bool) -> Path:
        """As `_Named.check`."""
        from shards.remote_folder import open_remote_folder
        from shards.storage import is_local, parse_place
        from uniemox_dist.core.files import is_remote, require_local

        if not is_remote(text):
            return Path(require_local(text, field))
        place = parse_place(text, field)
        if not is_local(place):
            open_remote_folder(place, field)  # refuses what can only be read
        return place


class LocalFolder(_Named):
    """A folder on a local or network file system, which the command reads or writes and checks itself."""

    name = "folder"

    def __init__(self) -> None:
        super().__init__("give a folder")

    def check(self, text: str, field: str, *, seen: bool) -> Path:
        """As `_Named.check`."""
        from uniemox_dist.core.files import require_local

        return Path(require_local(text, field))


class Tars(_Named):
    """A folder of tars, a URL of one or a pattern of tars, as a text; the command checks it itself."""

    name = "place"

    def __init__(self) -> None:
        super().__init__("give a folder")

    def check(self, text: str, field: str, *, seen: bool) -> str:
        """As `_Named.check`."""
        return text


class Release(_Named):
    """A folder that `uniemox release` wrote.

    Args:
        classifier: whether a fine-tuned classifier will do as well.
        timm: whether `timm:NAME=FILE` will do as well.
    """

    name = "folder"

    def __init__(self, *, classifier: bool = False, timm: bool = False) -> None:
        super().__init__("give a folder that `uniemox release RUN OUT` wrote")
        self.classifier, self.timm = classifier, timm

    def check(self, text: str, field: str, *, seen: bool) -> Path | str:
        """As `_Named.check`."""
        from uniemox_dist.evaluate.inputs import TIMM_PREFIX, parse_timm
        from uniemox_dist.release.format import is_classifier, read_release

        path = Path(text)
        if self.timm and text.startswith(TIMM_PREFIX):
            if seen:
                parse_timm(text)
            return text
        if seen and not (self.classifier and is_classifier(path)):
            read_release(path, field=field)
        return path


def _field(param: click.Parameter | None) -> str:
    """The name of an argument or option in errors: `RELEASE`, or `--release`."""
    if param is None:
        return "path"
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return (param.metavar or param.name or "").upper().removesuffix("...")


class FolderType(click.ParamType):
    """The folder of a data set, local or remote."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from shards.storage import parse_place

        return parse_place(value, "DIR")


REMOTE_FOLDER = click.argument("folder", type=FolderType(), metavar="DIR")
