"""Compiled code is kept where only its user can write, and a machine without a compiler is recognised."""

import os
import stat
from pathlib import Path

import pytest

from uniemox_dist.models.compilation import CACHES, find_obstacle, use_private_cache


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate folder for temporary files and a separate home; neither cache is set."""
    for variable in (*CACHES, "CC", "CXX"):
        # Setting first makes monkeypatch restore it: use_private_cache sets the variables itself.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    tmp, home = tmp_path / "tmp", tmp_path / "home"
    tmp.mkdir()
    tmp.chmod(0o1777)
    home.mkdir(mode=0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp))
    monkeypatch.setenv("HOME", str(home))
    return tmp


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_all_ranks_of_a_node_and_later_runs_share_one_folder_of_mode_0700(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = environment / f"uniemox-{os.getuid()}"
    assert use_private_cache() == base / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(base / "triton")
    assert [mode(base), mode(base / "inductor"), mode(base / "triton")] == [0o700] * 3
    for variable in CACHES:
        monkeypatch.delenv(variable)
    assert use_private_cache() == base / "inductor"


def test_folders_that_the_user_names_are_used(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = environment.parent / "named/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(named))
    assert use_private_cache() == named
    assert mode(named) == 0o700
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(environment))


@pytest.mark.parametrize("fault", ["others may write", "another owner", "a file", "a foreign parent"])
def test_a_folder_that_another_user_could_change_is_not_used(
    environment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    base = environment / f"uniemox-{os.getuid()}"
    if fault == "a file":
        base.touch()
    else:
        base.mkdir()
    if fault == "others may write":
        base.chmod(0o777)
    if fault in ("another owner", "a foreign parent"):
        if os.getuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(base, 12345, 12345)
    if fault == "a foreign parent":  # as a batch script names it
        (base / "inductor").mkdir(mode=0o700)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
    found = use_private_cache()
    assert found == environment.parent / "home/.cache/uniemox/inductor"
    assert mode(found.parent) == 0o700
    assert bool(caplog.messages) == (fault == "a foreign parent")
    if caplog.messages:
        assert "TORCHINDUCTOR_CACHE_DIR=" in caplog.messages[0]


def test_a_folder_that_torch_has_chosen_is_not_taken_for_the_users(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(environment / "torchinductor_somebody"))
    assert use_private_cache() == environment / f"uniemox-{os.getuid()}" / "inductor"


def test_without_any_safe_folder_the_cache_is_a_new_one(environment: Path) -> None:
    (environment / f"uniemox-{os.getuid()}").touch()
    (environment.parent / "home/.cache").touch()
    found = use_private_cache()
    assert found.parent.parent == environment
    assert found.parent.name.startswith("uniemox-")
    assert mode(found.parent) == 0o700


@pytest.mark.parametrize(
    ("device", "compiler"), [("cpu", "C++ compiler (g++)"), ("cuda", "C compiler (gcc or clang)")]
)
def test_a_machine_without_a_compiler_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, compiler: str
) -> None:
    monkeypatch.setattr("uniemox_dist.models.compilation.find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_obstacle(device) == f"there is no {compiler}"
    for name in ("g++", "clang"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert find_obstacle(device) == f"{tmp_path} does not hold Python's headers (Python.h)"
    (tmp_path / "Python.h").touch()
    assert find_obstacle(device) is None


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniemox_dist.models.compilation.find_spec", lambda name: None)
    assert find_obstacle("cuda") == "the package triton is not installed"
