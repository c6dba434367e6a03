"""Bad input of ElasticShards: each mistake is one line that names the argument or file, its value and a fix."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from elastic_tars import epoch, open_stream, write_tars
from web import serve

from shards.edit.index_members import index_members
from shards.edit.index_tars import index_folder
from shards.format.manifest import Manifest, read_manifest
from shards.format.members import write_members
from shards.format.sample import MEMBERS_NAME
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import sha256_file
from uniemox_dist.data import Source
from uniemox_dist.distributed.local_launcher import free_port

COUNTS = (20, 21)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tars(tmp_path_factory.mktemp("tars"), COUNTS)
    index_members(str(folder))
    return folder


@pytest.fixture
def own(tars: Path, tmp_path: Path) -> Path:
    """A copy for tests that change it."""
    return Path(shutil.copytree(tars, tmp_path / "own"))


def refused(make: Callable[[], Any], kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1.5}, "seed=1.5: is not a whole number"),
        ({"seed": None}, "seed=None: is not a whole number"),
        ({"streams": "6"}, "streams='6': is not a whole number of at least 1"),
        ({"global_batch": True}, "global_batch=True: is not a whole number of at least 1"),
        ({"rank": "0", "world_size": "2"}, "rank='0', world_size='2': a rank is one of 0…world_size-1"),
        ({"max_bad_share": 5}, "max_bad_share=5: is not a number from 0 to 1"),
        ({"retry_s": -1}, "retry_s=-1: is not a number of at least 0"),
        ({"cache_gb": "1"}, "cache_gb='1': is not a number of at least 0"),
        ({"cache_dir": __file__}, f"cache_dir={__file__}: cannot be written (File exists); give a writable folder "
         "on the node's disk, or leave cache_dir out"),
        ({"decode": 3}, "decode=3: is neither the name of a handler of webdataset, such as 'pil', nor a function of "
         "key and bytes"),
        ({"decode": ["pil", 3]}, "decode=3: is neither the name of a handler of webdataset, such as 'pil', nor a "
         "function of key and bytes"),
    ],
)  # fmt: skip
def test_arguments_of_a_wrong_kind_are_named(options: dict[str, Any], says: str, tars: Path) -> None:
    assert refused(lambda: open_stream(tars, **options)) == says


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "data=None: is neither a folder, a URL, a tar nor a brace pattern; give one, or a list"),
        (5, "data=5: is neither a folder, a URL, a tar nor a brace pattern; give one, or a list"),
        (b"a", "data=b'a': is neither a folder, a URL, a tar nor a brace pattern; give one, or a list"),
        (["TARS", 5], "data[1]=5: is neither a folder, a URL, a tar nor a brace pattern; give one, or a list"),
        ("", "data='': is empty; give a folder, a URL, a tar or a brace pattern"),
        ("nope", "data=nope: no such folder; give a folder of tars"),
        ("TARS/*.tar", "data=TARS/*.tar: *.tar is not in the index (TARS/members); give the folder, or braces such as "
         "{000..012}.tar instead of *"),
        ("TARS/{000..002}.tar", "data=TARS/{000..002}.tar: 002.tar is not in the index (TARS/members); index it too, "
         "or correct the pattern"),
        ("foo://x/{0..3}.tar", "data=foo://x: Unsupported filesystem: 'foo'; valid are s3://, gs://, az://, "
         "http(s)://, file://"),
        ([Source("TARS", index="a"), Source("TARS", index=5)],  # type: ignore[arg-type]
         "data[1].index=5: is not a folder; give the folder of the index"),
        ([Source("TARS", weight="2")],  # type: ignore[arg-type]
         "data[0].weight='2': is not a number above 0"),
    ],
)  # fmt: skip
def test_data_that_are_no_tars_are_named(
    data: Any, says: str, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TARS").symlink_to(tars)
    assert refused(lambda: open_stream(data)) == says


def test_arguments_of_loaders_are_named(tars: Path) -> None:
    stream = open_stream(tars)
    for options, says in (
        ({"timeout_s": -1}, "timeout_s=-1: is not a number of at least 1"),
        ({"collate": 3}, "collate=3: is not a function of a list of samples"),
        ({"workers": 1.0}, "workers=1.0: is not a whole number of at least 0"),
    ):
        assert refused(lambda options=options: stream.loader(6, **options)) == says  # type: ignore[misc]
    for make in (stream.loader, stream.sampler, stream.source):
        for size in (0, 2.0, "a"):
            says = f"micro_batch={size!r}: is not a whole number of at least 1"
            assert refused(lambda make=make, size=size: make(size)) == says  # type: ignore[misc]
    assert refused(lambda: stream[-1]) == "slot=-1: is not a whole number of at least 0"
    assert refused(lambda: next(iter(stream))) == (
        "ElasticShards: cannot be iterated itself; use micro_batches(…) or loader(…)"
    )


def test_states_that_were_edited_or_belong_to_another_window_are_refused(tars: Path) -> None:
    state = open_stream(tars).state_dict()
    load = open_stream(tars, rank=0, world_size=2).load_state_dict
    assert refused(lambda: load({**state, "samples": 2**80})).startswith(
        f"state.samples={2**80}: is not a number"
    )
    assert refused(lambda: load({**state, "samples": 3, "world_size": 2})) == (
        "state.samples=3: is not the same number for each of 2 ranks; the state was edited"
    )
    assert refused(lambda: open_stream(tars, window=512).load_state_dict(state)) == (
        "state: is of another stream: window was 16 and is 512; open the stream as it was, or begin anew without the "
        "state"
    )


def test_errors_of_building_an_index_use_the_names_of_the_arguments(own: Path, tmp_path: Path) -> None:
    def build(folder: Path, **options: Any) -> str:
        return refused(lambda: open_stream(folder, build_index=True, **options))

    shutil.rmtree(own / "members")
    file = tmp_path / "file"
    file.touch()
    assert build(own, index=file) == f"index={file}: {file} is a file; give a folder"
    (own / "000.tar").write_bytes((own / "000.tar").read_bytes()[:5000])
    assert build(own) == (
        f"data={own}/000.tar: not a complete tar (empty header); copy it again or remove it"
    )
    (own / "000.tar").write_bytes(gzip.compress(b"x" * 1024))
    assert build(own) == (
        f"data={own}/000.tar: a compressed tar cannot be read by position; decompress it first (gunzip)"
    )
    empty = write_tars(tmp_path / "empty", (0, 0))
    assert build(empty) == f"data={empty}: no sample in 2 tars; members need names such as 0001.jpg"
    (tmp_path / "nothing").mkdir()
    assert build(tmp_path / "nothing").startswith(f"data={tmp_path / 'nothing'}: has no .tar files")


def test_an_index_on_another_place_is_named(own: Path, tmp_path: Path) -> None:
    (own / "members").rename(tmp_path / "index")
    assert open_stream(own, index=tmp_path / "index").samples == sum(COUNTS)
    assert refused(lambda: open_stream(own)) == (
        f"data={own}: has no index; run `uniemox shards index {own} --members`"
    )
    assert refused(lambda: open_stream(own, index=tmp_path / "x")) == (
        f"index={tmp_path / 'x'}: no such folder; write it with `uniemox shards index DIR --members`"
    )
    other = write_tars(tmp_path / "other", (5,))
    assert refused(lambda: open_stream(other, index=tmp_path / "index")).startswith(
        f"data={other}: shard 000.tar has {os.path.getsize(other / '000.tar')} bytes instead of "
    )


def test_tars_that_changed_since_they_were_indexed_are_named(own: Path, tmp_path: Path) -> None:
    others = write_tars(tmp_path / "others", COUNTS, first=500)
    assert os.path.getsize(others / "000.tar") == os.path.getsize(own / "000.tar")
    shutil.copy(others / "000.tar", own)
    ask = "bytes differ from the index. Were the tars replaced since they were indexed? Then index them again"
    says = refused(lambda: epoch(open_stream(own)), Fault)
    assert says.startswith("24 of 36 samples are damaged, more than max_bad_share=0.01; the last: slot ")
    assert says.endswith(ask)
    assert "bytes differ from the index" in refused(lambda: epoch(open_stream(own, strict=True)), Fault)
    shutil.copy(others / "001.tar", own)
    says = refused(lambda: epoch(open_stream(own, max_bad_share=1)), Fault)
    assert says.startswith("too many damaged samples in a row: slot ")
    assert says.endswith(ask)
    stream = open_stream(own, retry_s=0)
    (own / "001.tar").write_bytes(b"")
    says = refused(lambda: epoch(stream), Fault)
    assert says.startswith(f"data={own}: shard 001.tar could not be read for 0 s (0 bytes instead of ")
    stream.close()
    (own / "001.tar").unlink()
    assert refused(lambda: epoch(stream), Fault) == (
        f"data={own}: shard 001.tar: No such file or directory; copy it again, then start again"
    )
    assert "shard 001.tar is missing; it is not the tar that was indexed" in refused(lambda: open_stream(own))


def rewrite_row(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the first row of the index of 000.tar, and the hash in the manifest: as somebody who makes an index."""
    manifest, path = (
        read_manifest(folder / "members", format=MEMBERS_NAME),
        folder / "members/index/000.parquet",
    )
    rows = pq.read_table(path).to_pylist()
    change(rows[0])
    write_members(path, rows)
    first, *others = manifest.shards
    entries = (replace(first, index_sha256=sha256_file(path)), *others)
    Manifest(entries, manifest.provenance, manifest.format_version, manifest.format).write(folder / "members")


@pytest.mark.parametrize(("field", "value"), [("offset", 1 << 62), ("length", 1 << 62), ("length", 1 << 40)])
def test_an_index_that_names_bytes_beyond_its_tar_is_refused_at_once(
    field: str, value: int, own: Path
) -> None:
    rewrite_row(own, lambda row: row["members"][0].update({field: value}))
    size = (own / "000.tar").stat().st_size
    stream = open_stream(own, retry_s=1e9)
    says = refused(lambda: epoch(stream))
    assert re.fullmatch(
        rf"data={own}: 000\.tar: the index states bytes \d+ to \d{{13,}} of a tar of {size:,} bytes; copy the index "
        "again, or index the tars again",
        says,
    )
    assert stream.readers[0].origin.counts.retries == 0


@pytest.mark.parametrize("name", ["__key__", "__url__"])
def test_an_index_whose_members_would_replace_the_key_of_a_sample_is_refused(name: str, own: Path) -> None:
    rewrite_row(own, lambda row: row["members"][0].update(name=name))
    says = refused(lambda: epoch(open_stream(own, verify_hash=False)))
    assert says.startswith(
        f"{own}/members/index/000.parquet: the index holds an illegal value; copy the folder"
    )


def test_keys_in_errors_are_cut_and_have_no_control_characters(own: Path) -> None:
    rewrite_row(own, lambda row: row.update(key="a\n\x1b[31m" + "y" * 10_000, sha256="0" * 64))
    says = refused(lambda: epoch(open_stream(own, strict=True)), Fault)
    assert re.search(r"000\.tar: a  \[31my{200,240} …: bytes differ from the index$", says)
    says = refused(
        lambda: epoch(open_stream(own, verify_hash=False, transform=lambda sample: sample["none"]))
    )
    assert len(says) < 600


def test_passwords_in_addresses_are_in_no_error_log_or_state(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(own) as web:
        address = web.url.replace("://", "://me:s3cret@")
        stream = open_stream(address, index=own / "members", retry_s=0)
        epoch(stream)
        texts = [json.dumps(stream.state_dict()), stream.describe_slot(0)]
        texts += [refused(lambda: epoch(open_stream(address, transform=lambda sample: sample["none"])))]
        with pytest.raises(ZeroDivisionError):
            epoch(open_stream(address, transform=lambda sample: 1 // 0))
        texts += [refused(lambda: open_stream(address, index=f"{address}/nothing"))]
        os.truncate(own / "000.tar", 1024)
        texts += [refused(lambda: open_stream(address))]
        shutil.copy(own / "000.tar", own / "members/index/000.parquet")
        texts += [refused(lambda: open_stream(address, index=f"{address}/members"))]
        (own / "members/manifest.json").write_text("{}")
        texts += [refused(lambda: open_stream(address))]
    texts += [refused(lambda: open_stream(address, retry_s=0), Fault)]
    texts += [refused(lambda: epoch(stream), Fault)]
    assert "transform failed at http://…@127.0.0.1:" in caplog.text
    assert all("…@127.0.0.1:" in text for text in texts[1:])
    assert not [text for text in (*texts, caplog.text) if "s3cret" in text]


def test_a_server_that_is_gone_is_a_fault_and_not_a_missing_tar(own: Path) -> None:
    with serve(own) as web:
        address = web.url
    says = refused(lambda: open_stream(address, index=own / "members", retry_s=0), Fault)
    assert says.startswith(
        f"data={address}: the sizes of its tars could not be read for 0 s ({address}/000.tar: no answer ("
    )


def test_an_index_of_pictures_that_lacks_members_is_named(photo_folder: Path, tmp_path: Path) -> None:
    import webdataset as wds

    pictures = sorted(photo_folder.rglob("*.jpg"))[:4]
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number, picture in enumerate(pictures):
            writer.write({"__key__": f"k{number}", "jpg": picture.read_bytes()})
        for number in range(len(pictures)):  # behind all pictures, where no range of a sample reaches
            writer.write({"__key__": f"k{number}", "cls": number})
    index_folder(tmp_path)
    options = {"global_batch": 2, "streams": 2, "decode": None, "transform": None}
    says = refused(lambda: epoch(open_stream(tmp_path, **options), 2))
    assert says.startswith(f"data={tmp_path}: 0.tar: ")
    assert says.endswith(
        "the index of pictures does not list all members of this sample; run `uniemox shards index "
        f"{tmp_path} --members`"
    )


def test_a_member_or_an_entry_of_json_that_transform_wants_is_named(tars: Path) -> None:
    fix = "Let `transform` do without it, or raise DamagedSample there to replace such samples"
    for options, says in (
        ({"decode": None, "transform": lambda s: s["txt"]}, "has no member 'txt', which `transform` wants; it has"),
        ({"decode": None, "transform": lambda s: s["jpg;png"]}, "has no member 'jpg;png', which `transform` wants"),
        ({"transform": lambda s: s["json"]["caption"]},
         "has no member 'caption', which `transform` wants, nor has its json such an entry; it has: cls, json, npy"),
        ({"transform": lambda s: s.pop(".json")}, "has no member '.json', which `transform` wants, nor has"),
    ):  # fmt: skip
        for workers in (0, 1):
            stream = open_stream(tars, **options)  # type: ignore[arg-type]
            found = refused(lambda stream=stream, n=workers: epoch(stream, workers=n))  # type: ignore[misc]
            assert says in found
            assert found.endswith(fix)
    with pytest.raises(KeyError):  # a mistake of the function itself
        epoch(open_stream(tars, transform=lambda s: {}[s["json"]["n"]]))


def test_fewer_samples_than_streams_or_a_global_batch_are_read_in_turn(tmp_path: Path) -> None:
    few = write_tars(tmp_path / "few", (0, 3, 0))
    stream = open_stream(few, build_index=True, global_batch=24, streams=12)
    (batch,) = epoch(stream, 24)
    assert sorted(batch) == sorted([0, 1, 2] * 8)
    ranks = [
        epoch(open_stream(few, rank=rank, world_size=3, global_batch=24, streams=12), 8) for rank in range(3)
    ]
    assert sorted(number for rank in ranks for number in rank[0]) == sorted(batch)


# ---- several processes

RANK = """
import os, signal, sys
import torch.distributed as dist
import shards.edit.index_members as module
from shards.format.manifest import Manifest, read_manifest
from shards.format.members import write_members
from shards.format.sample import MEMBERS_NAME
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import sha256_file
from uniemox_dist.data import ElasticShards

dist.init_process_group("gloo")
rank, (broken, tars) = dist.get_rank(), sys.argv[1:]

def attempt(data, **options):
    try:
        next(iter(ElasticShards(data, global_batch=4, streams=2, **options).loader(2)))
    except (UserError, Fault) as error:
        print(f"{type(error).__name__}: {error}", flush=True)

attempt(broken, build_index=True)
attempt(tars, build_index=True, seed=rank)
dist.get_rank, found = lambda *_: 0, dist.get_rank  # both take themselves for rank 0
stream = ElasticShards(tars, rank=0, world_size=2, global_batch=4, streams=2)
dist.get_rank = found
attempt([stream.readers[0]], rank=rank, world_size=2)
try:
    next(iter(stream.loader(2)))
except UserError as error:
    print(error, flush=True)
module.index_members = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
attempt(tars + "/more", build_index=True)
"""


def test_ranks_report_what_is_wrong_together(tmp_path: Path) -> None:
    broken, tars = write_tars(tmp_path / "broken", (5,)), write_tars(tmp_path / "tars", (5,))
    write_tars(tars / "more", (5,))
    (broken / "000.tar").write_bytes(b"")
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(broken), str(tars)],
            env={**os.environ, **environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert first == second[:3] == [
        f"UserError: data={broken}/000.tar: not a complete tar (empty file); copy it again or remove it",
        "UserError: seed: rank 0 has 0 and rank 1 has 1; open the stream alike on all ranks, and load the same state",
        "rank: 2 processes read as ranks 0 (2), 1 (0) of world_size=2, so some samples would be read more often than "
        "others; leave rank and world_size out, or give each rank to equally many processes",
    ]  # fmt: skip
    assert (tars / "members/manifest.json").exists()
    assert second[3].startswith(
        f"LostPeer: data={tars}/more: rank 0 builds its index, and lost contact with another rank; see that rank's log"
    )
    assert len(second) == 4
    assert ranks[0].returncode == -signal.SIGKILL


def test_ranks_that_have_not_met_do_not_build_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tars(tmp_path / "tars", (5,))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert refused(lambda: open_stream(data, build_index=True)) == (
            f"data={data}: has no index, and 2 processes cannot agree on who builds it without torch.distributed; run "
            "`uniemox shards index DIR --members` before, or initialise torch.distributed first"
        )
    assert not (data / "members").exists()
