"""Compiling parts of a pass with torch.compile: whether this machine can, and where compiled code is kept.

torch loads cached code with pickle, so nobody but this user may write to the folders that hold it.
"""

import logging
import os
import shutil
import stat
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

log = logging.getLogger("uniemox")
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variables that name folders of compiled code, and the names of these folders in a cache of ours."""


def find_obstacle(device_type: str) -> str | None:
    """Returns why torch.compile cannot work for a kind of device on this machine; None if it can.

    torch generates C++ for a CPU. For a GPU it generates Triton's language, and Triton needs a C compiler. Both include
    Python's headers.
    """
    gpu = device_type == "cuda"
    if gpu and find_spec("triton") is None:
        return "the package triton is not installed"
    kind, variable, names = ("C", "CC", ["gcc", "clang"]) if gpu else ("C++", "CXX", ["g++"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        return f"there is no {kind} compiler ({' or '.join(names)})"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"{headers} does not hold Python's headers (Python.h)"
    return None


def use_private_cache() -> Path:
    """Makes torch and Triton keep compiled code where only this user can write. Returns torch's folder.

    By default it is a folder of this user on the node's own disk, which all ranks of the node and later runs share.
    TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR are respected, unless another user could write there.
    """
    base: Path | None = None
    for variable, name in CACHES.items():
        wanted = os.environ.get(variable)
        if wanted and _is_torchs_default(Path(wanted)):
            wanted = None
        if wanted and _make_private(Path(wanted)):
            continue
        if wanted:
            log.warning("%s=%s: another user could write there; another folder is used", variable, wanted)
        base = base or _find_base()
        folder = base / name
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ[variable] = str(folder)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def _is_torchs_default(folder: Path) -> bool:
    """Returns whether torch has chosen a folder, which it records in the same variable as a user's choice."""
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")


def _find_base() -> Path:
    candidates = [Path(tempfile.gettempdir()) / f"uniemox-{os.getuid()}"]
    if (home := Path(os.path.expanduser("~"))).is_absolute():
        candidates.append(home / ".cache/uniemox")
    for folder in candidates:
        if _make_private(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="uniemox-"))


def _make_private(folder: Path) -> bool:
    """Creates a folder with mode 0700 where it is missing. Returns whether only this user (or root) can write to it.

    Others must not own it or a folder above it, nor be able to rename one of these.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        resolved = folder.resolve(strict=True)
        own = resolved.stat()
    except OSError:
        return False
    if own.st_uid != os.getuid() or own.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    for parent in resolved.parents:
        found = parent.stat()
        # In a sticky folder such as /tmp only its owner can rename a folder.
        sticky = bool(found.st_mode & stat.S_ISVTX)
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not sticky and (shared or found.st_uid not in (0, os.getuid())):
            return False
    return True


def tolerate_failures() -> None:
    """Makes parts that the compiler cannot compile run without it, after a warning."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True


def compile_options(*, cuda_graphs: bool = False) -> dict[str, Any]:
    """Options of torch.compile for parts whose shapes never change within a run. Random numbers are drawn as without
    compilation."""
    options: dict[str, Any] = {"fallback_random": True}
    if cuda_graphs:
        options["triton.cudagraphs"] = True
    return {"dynamic": False, "options": options}


def compile_blocks(part: Any, options: dict[str, Any]) -> None:
    """Compiles each block of an encoder or decoder, in place. Equal blocks share one graph, gradients are reduced while
    the backward pass runs, and ZeRO-3 gathers and frees weights between blocks."""
    for block in part.blocks:
        block.compile(**options)
