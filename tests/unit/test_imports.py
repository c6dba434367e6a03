"""The import order of the house, read from the source, and what a light install must not need."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("uniemox_dist", "shards", "launch")
ORDER = (
    "core", "config", "shards", "scheduler", "distributed", "checkpoints", "runs", "models", "data", "teacher",
    "release", "evaluate", "doctor", "train", "inference", "launch", "cli",
)  # fmt: skip
"""Packages, each of which may import only those before it. `doctor` comes before `train`, whose preflight it is; so
does `evaluate`, whose metrics measure the validations of fine-tuning."""
TORCH_FREE = ("core", "config", "shards", "scheduler", "runs", "launch")
HEAVY = {"torch", "deepspeed", "timm", "open_clip", "webdataset", "torchvision"}


def _modules() -> dict[str, Path]:
    found = {}
    for top in TOP:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports anywhere, for types alone included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in (*TOP, "tools"))


GRAPH = {name: {other for other in _imports(path) if other != name} for name, path in MODULES.items()}


def _package(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("shards", "launch"):
        return parts[0]
    return parts[1] if len(parts) > 1 else None


def test_every_package_has_a_place_in_the_order() -> None:
    assert {_package(name) for name in MODULES} - {None} == set(ORDER)


def test_imports_go_one_way() -> None:
    late = {
        (name, other)
        for name, others in GRAPH.items()
        for other in others
        if (mine := _package(name))
        and (theirs := _package(other))
        and ORDER.index(theirs) > ORDER.index(mine)
    }
    assert not late


def test_nothing_imports_tools() -> None:
    assert not [
        (name, other) for name, others in GRAPH.items() for other in others if other.startswith("tools")
    ]


def test_no_module_imports_itself_through_others() -> None:
    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in GRAPH.get(waiting.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return seen

    closure = {name: reached(name) for name in MODULES}
    in_cycles = {name for name in MODULES if name in closure[name]}
    cycles = {frozenset(o for o in in_cycles if o in closure[n] and n in closure[o]) for n in in_cycles}
    assert not cycles


def loaded_after_each(groups: dict[str, list[str]]) -> dict[str, set[str]]:
    """Imports groups of modules one after the other in one fresh process; the top-level packages that each adds."""
    code = (
        "import importlib, json, sys\n"
        "before, added = set(), {}\n"
        "for group, names in json.loads(sys.argv[1]).items():\n"
        "    for name in names: importlib.import_module(name)\n"
        "    now = {name.partition('.')[0] for name in sys.modules}\n"
        "    added[group], before = sorted(now - before), now\n"
        "print(json.dumps(added))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(groups)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {group: set(added) for group, added in json.loads(result.stdout).items()}


def _modules_of(*packages: str) -> dict[str, list[str]]:
    return {
        package: [name for name in MODULES if _package(name) == package and not name.endswith("__main__")]
        for package in packages
    }


def test_light_packages_and_the_base_install_import_without_torch() -> None:
    groups = {
        **_modules_of(*TORCH_FREE, "cli"),
        "the package": ["uniemox_dist"],
        "plan of samples": [f"uniemox_dist.data.{name}" for name in ("splits", "plan", "sources")],
        "preflight": ["uniemox_dist.doctor.all_checks", "uniemox_dist.doctor.preflight"],
        "launcher": ["uniemox_dist.distributed.world", "uniemox_dist.distributed.local_launcher"],
        "checkpoints": ["uniemox_dist.checkpoints.retention", "uniemox_dist.checkpoints.verify"],
    }
    heavy = {group: added & HEAVY for group, added in loaded_after_each(groups).items()}
    assert heavy == {group: set() for group in groups}


@pytest.mark.long
def test_release_evaluation_and_inference_load_without_deepspeed_and_webdataset() -> None:
    loaded = loaded_after_each(_modules_of("release", "evaluate", "inference"))
    assert "torch" in set().union(*loaded.values())
    unwanted = {package: added & {"deepspeed", "webdataset"} for package, added in loaded.items()}
    assert unwanted == {"release": set(), "evaluate": set(), "inference": set()}


@pytest.mark.long
def test_the_elastic_stream_opens_without_torch_and_reads_without_models() -> None:
    names = ("adapters", "elastic_loader", "lightning")
    loaded = loaded_after_each(
        {
            "open": ["uniemox_dist.data.elastic"],
            "read": [f"uniemox_dist.data.{name}" for name in names],
            "index": ["shards.edit.index_members"],
        }
    )
    assert {group: added & {*HEAVY, "scipy", "matplotlib"} for group, added in loaded.items()} == {
        "open": set(),
        "read": {"torch"},
        "index": set(),
    }
