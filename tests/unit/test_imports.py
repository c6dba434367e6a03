"""Who may import whom, read from the source; and what a light install must not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("uniemox_dist", "shards", "launch", "tools")
# Package -> packages of ours that it may import, besides itself and the leaves that everyone may.
ALLOWED = {
    "shards": set(),
    "uniemox_dist.config": set(),
    "uniemox_dist.runtime": set(),
    "uniemox_dist.models": {"uniemox_dist.checkpoints"},
    "uniemox_dist.checkpoints": set(),
    "uniemox_dist.data": {"shards"},
    "uniemox_dist.teach": {"uniemox_dist.data", "uniemox_dist.models"},
    "uniemox_dist.doctor": {
        "shards",
        "uniemox_dist.checkpoints",
        "uniemox_dist.data",
        "uniemox_dist.models",
        "uniemox_dist.runtime",
        "uniemox_dist.teach",
    },
    "uniemox_dist.train": {
        "shards",
        "uniemox_dist.checkpoints",
        "uniemox_dist.data",
        "uniemox_dist.doctor",
        "uniemox_dist.models",
        "uniemox_dist.release",  # fine-tuning keeps its best weights as a folder that timm loads
        "uniemox_dist.runtime",
        "uniemox_dist.teach",
    },
    "uniemox_dist.release": {
        "shards",
        "uniemox_dist.checkpoints",
        "uniemox_dist.data",
        "uniemox_dist.models",
        "uniemox_dist.runtime",
    },
    "uniemox_dist.evaluate": {"shards", "uniemox_dist.data", "uniemox_dist.models", "uniemox_dist.release"},
    "uniemox_dist.use": {
        "shards",
        "uniemox_dist.data",
        "uniemox_dist.evaluate",
        "uniemox_dist.models",
        "uniemox_dist.release",
        "uniemox_dist.runtime",
    },
    "uniemox_dist.report": {"uniemox_dist.checkpoints", "uniemox_dist.runtime"},
    "launch": {
        "shards",
        "uniemox_dist.checkpoints",
        "uniemox_dist.cli.main",  # a task of submitit runs a command, in its own process
        "uniemox_dist.data.draws",
        "uniemox_dist.data.plan",
        "uniemox_dist.data.sources",
        "uniemox_dist.models.flops",
        "uniemox_dist.models.parameters",
        "uniemox_dist.models.towers",
        "uniemox_dist.runtime",
    },
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] in OURS}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_the_house_allows(package: str) -> None:
    files = sorted((ROOT / package.replace(".", "/")).rglob("*.py"))
    assert files
    permitted = {package, "uniemox_dist.config", "uniemox_dist.runtime.errors", "uniemox_dist.runtime.files"}
    permitted |= ALLOWED[package] | {"uniemox_dist.__version__"}
    for path in files:
        for name in imports(path):
            fits = any(name == p or name.startswith(f"{p}.") for p in permitted)
            assert fits or any(p.startswith(f"{name}.") for p in permitted), (
                f"{path.relative_to(ROOT)} imports {name}"
            )


def test_nothing_imports_tools() -> None:
    for package in ("uniemox_dist", "shards", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            assert not any(name.startswith("tools") for name in imports(path)), path


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import uniemox_dist",
        "import shards.pack, shards.report, shards.sources.table, shards.sources.folder",
        "import uniemox_dist.cli.main, uniemox_dist.cli.shards, uniemox_dist.cli.pretrain, uniemox_dist.cli.release",
        "import uniemox_dist.cli.finetune, uniemox_dist.data.splits",
        "import uniemox_dist.cli.doctor, uniemox_dist.doctor.full, uniemox_dist.doctor.short",
        "import uniemox_dist.config.load, launch.local, launch.restarts, uniemox_dist.data.plan",
        "import launch.job.attempt, launch.job.settle, uniemox_dist.cli.launch_job, uniemox_dist.runtime.rank_output",
        "import uniemox_dist.runtime.run_folder, uniemox_dist.runtime.world, uniemox_dist.checkpoints",
        "import launch.order, launch.sweep, launch.here, launch.by_submitit, uniemox_dist.cli.launch",
        "import uniemox_dist.cli.status, uniemox_dist.cli.checkpoint, uniemox_dist.runtime.standing",
        "import uniemox_dist.cli.plan, uniemox_dist.cli.plan_page, launch.plan.whole, launch.plan.lead",
        "import uniemox_dist.checkpoints.retention, uniemox_dist.checkpoints.verify, uniemox_dist.report.page",
    ],
)
def test_the_base_install_needs_no_torch(statement: str) -> None:
    assert not loaded_after(statement) & {"torch", "deepspeed", "timm", "open_clip", "webdataset"}


def test_release_and_evaluation_load_without_deepspeed_and_webdataset() -> None:
    loaded = loaded_after(
        "import uniemox_dist.release.load, uniemox_dist.evaluate.run, uniemox_dist.release.export, "
        "uniemox_dist.evaluate.measure, uniemox_dist.use.embed, uniemox_dist.use.predict, uniemox_dist.use.reconstruct"
    )
    assert "torch" in loaded
    assert not loaded & {"deepspeed", "webdataset"}
