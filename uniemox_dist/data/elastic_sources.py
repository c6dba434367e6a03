"""The data that ElasticShards is given: its sources, their index, and checks of its other arguments."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.storage import parse_place
from uniemox_dist.core.errors import Fault, LostPeer, UserError, describe_lost_contact, is_lost_contact
from uniemox_dist.core.files import hide_secrets
from uniemox_dist.data.samples import has_index, name_index
from uniemox_dist.data.stream import Source
from uniemox_dist.distributed.world import World, is_joined


def check_whole(name: str, value: object, least: int | None = None) -> None:
    """Raises UserError unless an argument is a whole number, of at least `least`."""
    if type(value) is not int or (least is not None and value < least):
        raise UserError(
            f"{name}={value!r}: is not a whole number" + ("" if least is None else f" of at least {least}")
        )


def check_number(name: str, value: object, least: float, most: float = float("inf")) -> None:
    """Raises UserError unless an argument is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        span = f"of at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
        raise UserError(f"{name}={value!r}: is not a number {span}")


def list_sources(data: Any, index: str | Path | None) -> list[Source[Any]]:
    """The sources that the argument `data` names.

    Raises:
        UserError: if there is none, one is not a place of tars, or weights and repeats do not fit each other.
    """
    is_several = isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping)
    entries = list(data) if is_several else [data]
    if not entries:
        raise UserError("data=[]: names no tars; give a folder, a URL or a brace pattern")
    if index is not None and len(entries) > 1:
        raise UserError(
            f"index={index}: belongs to one of {len(entries)} sources; give Source(…, index=…) for each"
        )
    sources = [entry if isinstance(entry, Source) else Source(entry, index=index) for entry in entries]
    for number, source in enumerate(sources):
        _check_places(source, name_source(number, sources))
        for name in ("weight", "repeat"):
            value = getattr(source, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise UserError(f"data[{number}].{name}={value!r}: is not a number above 0")
        if source.weight is not None and source.repeat is not None:
            raise UserError(f"data[{number}]: has a weight and a repeat; give one of them")
    repeats = [source.repeat is not None for source in sources]
    if any(repeats) and not all(repeats):
        raise UserError(
            f"data[{repeats.index(False)}]: has no repeat where others have one; give all one, or none"
        )
    return sources


def name_source(number: int, sources: Sequence[Source[Any]]) -> str:
    """What errors call a source."""
    return "data" if len(sources) == 1 else f"data[{number}]"


def make_index(data: str, index: str | None, field: str, world: World) -> None:
    """Indexes tars that have no index, on rank 0 while the others wait.

    Raises:
        UserError, Fault: on all ranks, if that is not possible.
    """
    if world.size > 1 and not is_joined():
        if not has_index(data, index, field):
            raise UserError(
                f"{field}={hide_secrets(data)}: has no index, and {world.size} processes cannot agree on who builds it "
                "without torch.distributed; run `uniemox shards index DIR --members` before, or initialise "
                "torch.distributed first"
            )
        return
    from uniemox_dist.distributed import collectives

    try:
        problem = collectives.on_main(world, lambda: _build(data, index, field))
    except RuntimeError as error:
        if not is_lost_contact(str(error)):
            raise
        raise LostPeer(
            f"{field}={hide_secrets(data)}: rank 0 builds its index, and {describe_lost_contact(str(error))}"
        ) from None
    if problem is not None:
        raise (UserError if problem[0] == "user" else Fault)(problem[1])


def _build(data: str, index: str | None, field: str) -> tuple[str, str] | None:
    """Indexes tars that have no index. Returns the kind and text of an error, for all ranks."""
    from shards.edit.index_members import index_members

    try:
        if not has_index(data, index, field):
            # In this process: others would import the user's script, which may lack a main guard.
            index_members(data, index=None if index is None else parse_place(index, name_index(field)))
    except (UserError, Fault) as error:
        # The names of the command's arguments become those of ours.
        text = str(error).replace("DIR=", f"{field}=", 1).replace("--index=", f"{name_index(field)}=", 1)
        text = text.replace("--index FOLDER", f"{name_index(field)}=FOLDER").replace(
            "--index", name_index(field)
        )
        return ("user" if isinstance(error, UserError) else "fault"), text
    return None


def _check_places(source: Source[Any], field: str) -> None:
    """Raises UserError unless data and index are places, or data is a reader."""
    if not isinstance(source.data, str | Path) and not hasattr(source.data, "read"):
        raise UserError(
            f"{field}={source.data!r}: is neither a folder, a URL, a tar nor a brace pattern; give one, or a list"
        )
    if source.data == "":
        raise UserError(f"{field}='': is empty; give a folder, a URL, a tar or a brace pattern")
    if source.index is not None and not isinstance(source.index, str | Path):
        raise UserError(
            f"{name_index(field)}={source.index!r}: is not a folder; give the folder of the index"
        )
