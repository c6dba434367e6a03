"""The inputs of embed, predict and reconstruct: a picture, a folder, a table, tars or packed shards.

A picture that cannot be read keeps its place in the output, with the reason.
"""

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards.detect.types import Person
from shards.format.manifest import find_manifest_folders
from shards.pictures.formats import BadPicture
from shards.sources import Cell, Image, Record, SourceOptions, open_source
from shards.sources.files import fetch_images
from shards.sources.tables import CellReader
from shards.sources.tars import TARS
from shards.storage import parse_place
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings, plan_evaluation_views
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import allocate_views, read_size, render

TABLES = (".parquet", ".csv", ".jsonl", ".ndjson", ".arrow", ".feather")
MOST_REASON = 200


@dataclass(frozen=True)
class Batch:
    """Consecutive pictures. Shapes: B pictures, S the encoder's side."""

    first: int
    """Number of the first picture in the whole input."""
    names: tuple[str, ...]
    scene_B3HW: Tensor
    """uint8 B×3×S×S; zeros for a picture that could not be read."""
    person_B3HW: Tensor
    """The person's crop; the whole picture if no person is known."""
    errors: tuple[str | None, ...]
    """The reason for each picture that could not be read."""


class Pictures:
    """The pictures of an input by number. Cheap to pickle for worker processes."""

    def __init__(self, source: str, layout: str | None = None) -> None:
        """Lists an input.

        Args:
            source: a picture, a folder of pictures or of packed shards, a table (.parquet, .csv, .jsonl), or tars.
            layout: a layout of `uniemox shards pack`, if the name does not show it.

        Raises:
            UserError: if the input is missing or contains no pictures.
        """
        self.source = source
        where = parse_place(source, "INPUT")
        self.readers: list[ShardReader] = []
        self.records: list[Record] = []
        if not where.exists():
            raise UserError(f"INPUT={source}: no such file or folder")
        if layout is None and where.is_dir() and (folders := find_manifest_folders(where)):
            self.readers = [ShardReader.from_folder(str(folder), "INPUT") for folder in folders]
            counts = [count for reader in self.readers for count in reader.counts]
            self._ends = list(accumulate(counts))
            self._shards = [(r, s) for r in self.readers for s in range(len(r.manifest.shards))]
            return
        kind = self._layout(source, is_dir=where.is_dir()) if layout is None else layout
        if kind is None:
            self.records = [Record(where.name, source)]
            return
        try:
            self.records = list(
                open_source(kind, source, SourceOptions(source_persons=True, allow_outside=True))
            )
        except UserError as error:
            raise UserError(str(error).replace("SOURCE=", "INPUT=", 1)) from None

    def __len__(self) -> int:
        return self._ends[-1] if self.readers else len(self.records)

    @property
    def identity(self) -> list[str]:
        """Identifies this input: the identities of its data sets, or the names of its pictures."""
        if self.readers:
            return [reader.manifest.identity for reader in self.readers]
        return [record.name for record in self.records]

    @staticmethod
    def _layout(source: str, *, is_dir: bool) -> str | None:
        name = source.lower()
        if is_dir:
            return "folder"
        return "table" if name.endswith(TABLES) else "wds" if name.endswith(TARS) else None

    def read(
        self, numbers: Sequence[int], cells: CellReader
    ) -> Iterator[tuple[str, bytes | str, tuple[Person, ...]]]:
        """Yields name, encoded bytes (or, as str, why they cannot be read) and persons of some pictures."""
        if self.readers:
            for number in numbers:
                at = bisect_right(self._ends, number)
                row = number - (self._ends[at - 1] if at else 0)
                reader, shard = self._shards[at]
                try:
                    raw = reader.read(shard, row)
                    yield raw.key, raw.image, raw.persons
                except ValueError as error:
                    yield f"{reader.manifest.shards[shard].name}#{row}", str(error), ()
            return
        for number in numbers:
            record = self.records[number]
            image: bytes | BadPicture
            if record.refused is not None:
                image = BadPicture(*record.refused)
            else:
                where: Image | BadPicture = record.image
                if isinstance(where, Cell):
                    where = cells.read(where, where.row_group)
                image = fetch_images([where])[0]
            known = record.persons if record.boxes_size is None else None
            name = record.name
            yield name, image.detail if isinstance(image, BadPicture) else image, known or ()


def none_readable(source: str, count: int, failed: Sequence[tuple[str, str]]) -> UserError:
    """The error for an input whose `count` pictures all cannot be read; `failed` has name and reason of some."""
    if not failed:
        return UserError(f"{source}: has no pictures; give another input")
    name, reason = failed[0]
    what = "its only picture cannot be read" if count == 1 else f"none of its {count:,} pictures can be read"
    return UserError(f"{source}: {what} ({name}: {reason}); give other pictures")


class PictureBatches(Dataset[Batch]):
    """`dataset[i]` is the i-th batch, decoded and cropped as for evaluation, without randomness."""

    def __init__(self, pictures: Pictures, settings: ViewSettings, batch: int, numbers: range) -> None:
        self.pictures, self.settings, self.batch, self.numbers = pictures, settings, batch, numbers
        self._cells: CellReader | None = None

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch)

    def __getitem__(self, index: int) -> Batch:
        numbers = self.numbers[index * self.batch : (index + 1) * self.batch]
        self._cells = self._cells or CellReader(allow_outside=True)
        size = self.settings.image_size
        scene, person = allocate_views(len(numbers), size).zero_(), allocate_views(len(numbers), size).zero_()
        names: list[str] = []
        errors: list[str | None] = []
        for i, (name, image, persons) in enumerate(self.pictures.read(numbers, self._cells)):
            names.append(name)
            errors.append(_draw(image, persons, self.settings, scene[i], person[i]))
        return Batch(numbers[0], tuple(names), scene, person, tuple(errors))


def load_batches(
    pictures: Pictures,
    settings: ViewSettings,
    *,
    batch: int,
    workers: int = 0,
    first: int = 0,
) -> Iterator[Batch]:
    """Yields the pictures from number `first` on, in order, decoded in worker processes."""
    dataset = PictureBatches(pictures, settings, batch, range(first, len(pictures)))
    context = "fork" if workers else None
    with warnings.catch_warnings():
        # Torch warns if there are more processes than cores, but workers that wait for storage may be more.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=context,
            worker_init_fn=_use_one_thread,
        )
        some = iter(loader)
    yield from some


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _draw(
    image: bytes | str,
    persons: tuple[Person, ...],
    settings: ViewSettings,
    scene_3HW: Tensor,
    person_3HW: Tensor,
) -> str | None:
    """Fills both views. Returns the reason if the picture cannot be read."""
    if isinstance(image, str):
        return image[:MOST_REASON]
    try:
        width, height = read_size(image)
        plan = plan_evaluation_views(width, height, persons, settings)
        render(image, (width, height), plan, scene_3HW, person_3HW)
    except ValueError as error:
        scene_3HW.zero_()
        person_3HW.zero_()
        return " ".join(str(error).split())[:MOST_REASON]
    return None
