"""`shards select` and `split` from and to a store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import list_local, list_names, list_objects, serve_s3, upload

from shards.edit.select import select, split
from shards.storage import parse_place
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError


@pytest.fixture(scope="module")
def bucket(photo_shards: Path) -> Iterator[str]:
    with serve_s3("data"):
        upload(photo_shards, "s3://data/photos")
        yield "s3://data"


@pytest.mark.parametrize("dir_is_remote", [False, True])
def test_selections_and_splits_on_a_store_have_the_same_files_as_on_disk(
    dir_is_remote: bool, bucket: str, photo_shards: Path, tmp_path: Path
) -> None:
    folder = f"{bucket}/photos" if dir_is_remote else str(photo_shards)
    out = f"{bucket}/to-{dir_is_remote}"
    assert run(["shards", "select", folder, f"{out}/people", "--label", "people"]) == EXIT_DONE
    select(photo_shards, tmp_path / "people", labels=("people",))
    assert list_objects(f"{out}/people") == list_local(tmp_path / "people")
    assert run(["shards", "split", folder, f"{out}/halves", "--shares", "a=1,b=1"]) == EXIT_DONE
    split(photo_shards, tmp_path / "halves", {"a": 1.0, "b": 1.0})
    assert list_objects(f"{out}/halves") == list_local(tmp_path / "halves")
    if dir_is_remote:
        select(parse_place(folder), tmp_path / "down", labels=("people",))
        assert list_local(tmp_path / "down") == list_local(tmp_path / "people")


def test_wrong_selections_are_one_line_and_leave_nothing(
    bucket: str, photo_shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (["--link"], f"--link: OUT={bucket}/wrong is on a store, which has no links; leave --link out"),
        (["--filter", "side > 99999"], "no sample matches --filter 'side > 99999'; relax the conditions"),
    ):
        assert run(["shards", "select", str(photo_shards), f"{bucket}/wrong", *words]) == EXIT_USER
        assert says in capfd.readouterr().err.strip().splitlines()[-1]
    assert list_names(f"{bucket}/wrong") == []
    with pytest.raises(UserError, match=f"OUT={bucket}/photos: exists; give another folder, or delete it"):
        select(photo_shards, parse_place(f"{bucket}/photos"))
