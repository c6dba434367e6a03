"""A small release and a folder of pictures, made once."""

from pathlib import Path

import pytest
from PIL import Image
from small import make_release


@pytest.fixture(scope="session")
def small_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of several formats and sizes, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        picture = Image.radial_gradient("L").resize((40 + i, 60 - i)).convert("RGB").rotate(15 * i)
        picture.save(folder / f"{i:02d}.{('jpg', 'png', 'webp')[i % 3]}")
    (folder / "05.webp").write_bytes(b"RIFF, and nothing more")
    (folder / "06.jpg").write_bytes((folder / "06.jpg").read_bytes()[:200])
    return folder
