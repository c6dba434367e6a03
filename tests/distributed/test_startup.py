"""A start loads only what its first step needs."""

import json
import subprocess
import sys
from pathlib import Path

from ranks import TINY

from uniemox_dist.distributed.local_launcher import run_ranks

RANK = """
import json, os, sys
from pathlib import Path

programs = []

def note(event, arguments):
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec"):
        programs.append(os.path.basename(os.fsdecode(arguments[0])))

sys.addaudithook(note)
from uniemox_dist.cli.main import run

code = run(sys.argv[2:])
packages = sorted({name.partition(".")[0] for name in sys.modules})
Path(sys.argv[1], os.environ["RANK"] + ".json").write_text(json.dumps([programs, packages]))
sys.exit(code)
"""
UNUSED = {"matplotlib", "open_clip", "distutils", "pandas", "scipy", "sklearn", "jinja2", "onnxruntime"}


def test_a_rank_with_cached_views_trains_without_what_it_does_not_need(
    tmp_path: Path, taught_data: Path, tiny_teacher: Path
) -> None:
    settings = [*TINY, "run.max_steps=2", "batch.micro_batch=12", f"run.dir={tmp_path}", "run.name=run"]
    data = [f"data.path={taught_data}", "data.eval_path=null"]
    teacher = [f"teacher.name=local-dir:{tiny_teacher}", "teacher.source=cache"]
    command = [sys.executable, "-c", RANK, str(tmp_path), "pretrain", "demo", *settings, *data, *teacher]
    assert run_ranks(command, 2, gpus=False) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [set(packages) & UNUSED for _, packages in found] == [set(), set()]
    assert ["tensorboard" in packages for _, packages in found] == [True, False]
    # torch starts these two; DeepSpeed may start compilers where it probes its operators.
    assert [set(programs) - {"ldconfig", "uname"} for programs, _ in found] == [set(), set()]


CHECK = """
import sys
from uniemox_dist.cli.pretrain import COMMAND
COMMAND.check(COMMAND.load("demo", sys.argv[1:]), 2)
print(sorted({"torch", "timm", "open_clip", "deepspeed", "matplotlib"} & set(sys.modules)))
"""


def test_a_launcher_checks_the_settings_without_torch(tiny_data: Path) -> None:
    data = [f"data.path={tiny_data}/train", "data.eval_path=null"]
    settings = [*TINY, "run.max_steps=2", "batch.micro_batch=12", *data]
    command = [sys.executable, "-c", CHECK, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
