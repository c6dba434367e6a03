"""Tables of vectors: what is in them, from which inputs, and that a kill changes nothing."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import start_fork
from PIL import Image
from small import make_release
from tars import jpeg, write_tar

from uniemox_dist import load_uniemox
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import UserError
from uniemox_dist.inference import embed as embed_module
from uniemox_dist.inference.embed import embed
from uniemox_dist.inference.inputs import Pictures


def test_rows_are_the_releases_vectors_and_failures_have_their_place(
    small_release: Path, picture_folder: Path, tmp_path: Path
) -> None:
    model = load_uniemox(small_release)
    names = sorted(path.name for path in picture_folder.iterdir())
    sound = [name for name in names if name not in ("05.webp", "06.jpg")]
    with torch.no_grad():
        pictures = [Image.open(picture_folder / name) for name in sound]
        expected = {"encoder": model.encode(pictures), "fused": model.embed(pictures)}
    for space, wanted in expected.items():
        out = tmp_path / f"{space}.parquet"
        found = embed(str(picture_folder), out, small_release, space=space, batch=4, workers=1)
        assert (found.rows, found.failed) == (23, 2)
        assert [name for name, _ in found.reasons] == ["05.webp", "06.jpg"]
        table = pq.read_table(out)
        assert table["key"].to_pylist() == names
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), wanted.shape[1])
        assert [k for k, e in zip(names, table["error"].to_pylist()) if e] == ["05.webp", "06.jpg"]
        assert table["embedding"].null_count == 2
        rows = np.array([row for row in table["embedding"].to_pylist() if row is not None])
        np.testing.assert_allclose(rows, wanted.numpy(), rtol=1e-4, atol=1e-5)
        about = json.loads(table.schema.metadata[b"uniemox"])
        assert (about["space"], about["pictures"], about["width"]) == (space, 23, wanted.shape[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.parquet", "fused.parquet"]


def test_shards_and_their_table_give_the_same_vectors(
    small_release: Path, emoji_shards: Path, emoji_table: Path, tmp_path: Path
) -> None:
    embed(str(emoji_shards), tmp_path / "shards.parquet", small_release, batch=16)
    embed(str(emoji_table), tmp_path / "table.parquet", small_release, batch=32)
    rows = {}
    for kind in ("shards", "table"):
        table = pq.read_table(tmp_path / f"{kind}.parquet")
        rows[kind] = dict(zip(table["key"].to_pylist(), table["embedding"].to_pylist()))
    assert rows["shards"].keys() == rows["table"].keys()
    for key, vector in rows["table"].items():
        np.testing.assert_allclose(rows["shards"][key], vector, rtol=1e-4, atol=1e-5)


def embed_slowly(source: Path, out: Path, release: Path) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.4)
        return vectors(*arguments)

    vectors, embed_module.compute_vectors = embed_module.compute_vectors, slow
    embed(str(source), out, release, batch=4, part_s=0)


def test_a_killed_command_resumes_and_writes_the_same_table(
    small_release: Path, picture_folder: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.parquet"
    embed(str(picture_folder), whole, small_release, batch=4, part_s=0)
    out = tmp_path / "killed.parquet"
    process = start_fork(embed_slowly, picture_folder, out, small_release)
    parts = tmp_path / ".killed.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not out.exists()
    done = max(int(path.stem) for path in parts.glob("0*.parquet"))
    assert 8 <= done < 23
    times = {path: path.stat().st_mtime_ns for path in parts.glob("0*.parquet")}
    with pytest.raises(ValueError, match="was started with another space"):
        embed(str(picture_folder), out, small_release, space="fused", batch=4, part_s=0)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    embed(str(picture_folder), out, small_release, batch=4, part_s=60)
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_user_errors_are_one_line(
    small_release: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_release(tmp_path / "plain", embedding_width=None, relation=0.0, similarity=0.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.parquet").touch()
    new = str(tmp_path / "new.parquet")
    for arguments, says in (
        ([str(tmp_path / "empty"), new, "--release", str(small_release)], "has no pictures"),
        ([str(tmp_path / "none"), new, "--release", str(small_release)], "no such file or folder"),
        ([str(picture_folder), str(tmp_path / "there.parquet"), "--release", str(small_release)], "exists;"),
        ([str(picture_folder), new, "--release", str(plain), "--space", "fused"], "--space=fused:"),
        ([str(picture_folder), new, "--release", str(tmp_path)], "lacks uniemox.json"),
        (
            [str(picture_folder), new, "--release", str(small_release), "--device", "abacus"],
            "--device=abacus",
        ),
    ):
        assert run(["embed", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]
    assert not (tmp_path / "new.parquet").exists()


def test_one_picture_is_an_input_too(picture_folder: Path) -> None:
    assert len(Pictures(str(picture_folder / "00.jpg"))) == 1


def test_an_input_without_a_readable_picture_is_refused_and_no_file_is_left(
    small_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / name).write_text("no picture")
    for source, says in (
        ("in", "in: none of its 2 pictures can be read (a.jpg: "),
        ("in/b.jpg", "b.jpg: its only picture cannot be read (b.jpg: "),
    ):
        out = tmp_path / "new/out.parquet"
        assert run(["embed", str(tmp_path / source), str(out), "--release", str(small_release)]) == 2
        err = capsys.readouterr().err
        assert "uniemox: error: INPUT=" in err
        assert says in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_tars_in_any_order_are_read_and_compressed_ones_are_refused_with_the_command(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"y.jpg": jpeg(1), "x.jpg": jpeg(2), "x.txt": b"x", "y.txt": b"y"})
    assert [record.name for record in Pictures(str(tar)).records] == ["a.tar/y", "a.tar/x"]
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(UserError) as caught:
        Pictures(str(packed))
    assert str(caught.value) == (
        f"INPUT={packed}: a compressed tar cannot be read by position; decompress it first (gunzip)"
    )
