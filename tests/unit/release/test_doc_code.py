"""Every block of Python in README and docs, and in a model card, works: all are run on a release."""

import re
from pathlib import Path

import pytest
import torch
from handmade import config_of, write_checkpoint
from PIL import Image

from uniemox_dist.models.student import Student
from uniemox_dist.release.export import release

ROOT = Path(__file__).parents[3]
ELSEWHERE = {
    "docs/clusters.md": "tests/cluster submits it on a real Slurm",
    "docs/elastic.md": "tests/e2e/test_elastic_page.py runs the page from top to bottom",
    "docs/elastic_loaders.md": "tests/e2e/test_elastic_loaders_page.py runs each example on several ranks",
    "docs/finetune.md": "tests/distributed/test_finetune.py runs it behind the commands",
}
"""Documents whose blocks are run by other tests."""


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


DOCUMENTS = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(path.read_text())
]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    if str(path.relative_to(ROOT)) not in ELSEWHERE
    for number, block in enumerate(blocks(path.read_text()))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT, a release, and photo.jpg."""
    folder = tmp_path_factory.mktemp("docs")
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
    config = config_of({**shape, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config.model, config.loss, 12)
    write_checkpoint(folder / "run", student, config, 12)
    release(folder / "run", folder / "OUT", onnx=True)
    Image.radial_gradient("L").convert("RGB").save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_docs_runs(block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block, "<documentation>", "exec"), {})


def test_the_blocks_of_a_model_card_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = blocks((folder / "OUT" / "README.md").read_text())
    assert len(found) == 1
    exec(
        compile(found[0].replace("PATH", "OUT"), "<model card>", "exec"), {"picture": Image.open("photo.jpg")}
    )


def test_the_docs_have_blocks_that_run() -> None:
    assert len(BLOCKS) >= 4
    assert all((ROOT / name).exists() for name in ELSEWHERE)
