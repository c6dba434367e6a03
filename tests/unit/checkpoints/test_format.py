import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uniemox_dist.checkpoints import format as checkpoint_format
from uniemox_dist.checkpoints.format import write_part


@pytest.mark.parametrize("piece_bytes", [7, 64, 16 << 20])
def test_safetensors_reads_the_written_file_and_the_hash_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint_format, "PIECE_BYTES", piece_bytes)
    tensors = {
        "a@0@fp32": torch.randn(33),
        "matrix": torch.randn(5, 7).t(),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.5),
        "half": torch.randn(9).bfloat16(),
        "count": torch.arange(4),
    }
    path = tmp_path / "part.safetensors"
    size, sha256 = write_part(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    size, _ = write_part(tmp_path / "part.safetensors", {})
    assert size == (tmp_path / "part.safetensors").stat().st_size
    assert load_file(tmp_path / "part.safetensors") == {}


def test_a_write_that_has_no_room_raises_oserror(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from uniemox_dist.checkpoints.format import write_part\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_part(Path(sys.argv[1]), {'a': torch.zeros(5000)})\n"
        "except OSError as error:\n    print(error.strerror)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "part.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
