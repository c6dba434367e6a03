"""The examples of docs/elastic_loaders.md as their reader runs them: two processes are killed after four steps, and
others go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset as wds
from elastic_tars import number_of
from PIL import Image

from shards.edit.index_members import index_members
from uniemox_dist.data import ElasticShards
from uniemox_dist.distributed.local_launcher import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/elastic_loaders.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", PAGE, re.M | re.S))
GLOBAL_BATCH, STEPS = 24, 9
OPEN_CLIP = [
    "--train-data=tars",
    "--model=tiny",
    "--batch-size=4",
    "--workers=1",
    "--epochs=9",
    "--warmup=1",
    "--seed=0",
]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "tars"
    folder.mkdir()
    for tar in range(5):
        with wds.TarWriter(str(folder / f"{tar}.tar")) as writer:
            for number in range(tar * 42, tar * 42 + 42):
                picture = Image.new("RGB", (16, 16), (number, 0, 0))
                members = {"json": json.dumps({"n": number}), "jpg": picture, "txt": str(number)}
                writer.write({"__key__": f"s{number}", **members})
    index_members(str(folder))
    return folder


@pytest.fixture(scope="module")
def steps(tars: Path) -> list[list[int]]:
    """The numbers in each global batch of a pass, sorted."""
    data = ElasticShards(tars, global_batch=GLOBAL_BATCH, streams=12, decode=[], transform=number_of)
    return [sorted(batch) for batch in data.loader(GLOBAL_BATCH)]


def run(
    folder: Path, ranks: int, code: str, *options: str, name: str = "first", stop: int = STEPS
) -> list[list[int]]:
    """Runs a script on ranks; returns the numbers that they used in each step."""
    (folder / "example.py").write_text(code)
    shutil.copy(ROOT / "tests/support/reader_training.py", folder / "training.py")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{folder.parent}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RUN": name,
        "STOP": str(stop),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "example.py", *options],
            cwd=folder,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks if stop >= STEPS else -signal.SIGKILL in codes, "\n".join(errors)[-4000:]
    used = []
    for rank in range(ranks):
        lines = (folder / f"used.{name}.{rank}.jsonl").read_text().splitlines()
        used.append([json.loads(line) for line in lines])
    return [sorted(number for part in parts for number in part) for parts in zip(*used, strict=True)]


def check(
    folder: Path, tars: Path, steps: list[list[int]], code: str, *more: int, open_clip: bool = False
) -> None:
    """Four steps on two ranks, and the rest on each number of ranks."""

    def options(ranks: int) -> list[str]:
        accumulate = GLOBAL_BATCH // (4 * ranks)
        return [f"--accum-freq={accumulate}", *OPEN_CLIP] if open_clip else []

    folder.mkdir()
    (folder / "tars").symlink_to(tars)
    first = run(folder, 2, code, *options(2), stop=4)
    assert first == steps[:4]
    for ranks in more:
        copy = folder.parent / f"{folder.name}-{ranks}"
        shutil.copytree(folder, copy, symlinks=True)
        assert run(copy, ranks, code, *options(ranks), name="rest") == steps[4:]


@pytest.mark.long
@pytest.mark.parametrize("name", ["torch", "torchdata", "webdataset"])
def test_the_example_goes_on_with_other_ranks(
    name: str, tars: Path, steps: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip(name)
    check(tmp_path / "run", tars, steps, EXAMPLES[name], 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate", "transformers"])
def test_the_example_of_a_trainer_goes_on_with_other_ranks(
    name: str, tars: Path, steps: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip(name)
    check(tmp_path / "run", tars, steps, EXAMPLES[name], 1, 3)


@pytest.mark.slow
def test_the_main_for_open_clip_goes_on_with_other_ranks(
    tars: Path, steps: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "pandas.py").touch()  # open_clip_train imports it for CSV files
    line = "return islice(self.batches, self.num_batches)"
    code = EXAMPLES["open_clip"]
    assert code.count(line) == code.count("import open_clip\n") == 1
    code = code.replace(line, line.replace("islice", "recorded(islice") + ")")
    code = code.replace("import load, save", "import load, recorded, save")
    code = code.replace(
        "import open_clip\n",
        f"import open_clip\nopen_clip.add_model_config({str(tmp_path / 'tiny.json')!r})\n",
    )
    check(tmp_path / "run", tars, steps, code, 1, 3, open_clip=True)


PREPARED = """
from accelerate import Accelerator
from torch.utils.data import DataLoader
from training import to_tensors, train
from uniemox_dist.data import ElasticShards

accelerator = Accelerator()
data = ElasticShards("tars", global_batch=24, streams=12, decode=[], transform=to_tensors, {})
loader = accelerator.prepare(DataLoader(data, batch_sampler=data.sampler(4), num_workers=2))
for _ in range(2):
    for batch in loader:
        train(batch)
"""


@pytest.mark.slow
def test_accelerate_divides_a_stream_of_one_rank_and_none_of_several(
    tars: Path, steps: list[list[int]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "tars").symlink_to(tars)
    found = run(tmp_path, 2, PREPARED.format("rank=0, world_size=1"), stop=2 * STEPS)
    data = ElasticShards(tars, global_batch=GLOBAL_BATCH, streams=12, decode=[], transform=number_of)
    assert found == [sorted(batch) for _ in range(2) for batch in data.loader(GLOBAL_BATCH)]
    assert found[:STEPS] == steps
    with pytest.raises(
        AssertionError, match=r"UserError: batch_sampler: has the batches of one of 2 ranks, and a"
    ):
        run(tmp_path, 2, PREPARED.format(""))


def test_accelerate_cannot_skip_batches_of_the_loader(tars: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    data = ElasticShards(tars, global_batch=GLOBAL_BATCH, streams=12)
    with pytest.raises(AttributeError):
        accelerate.skip_first_batches(data.loader(4), 2)
    assert data.readers[0].origin.counts.reads == 0
