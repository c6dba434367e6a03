"""The process group ends with `close`, whatever was imported while it existed."""

import json
import sys
from pathlib import Path

import pytest
from ranks import TINY

from uniemox_dist.distributed.local_launcher import run_ranks

RANK = """
import json, os, sys
from pathlib import Path
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World

def gloo_threads():
    names = [Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task")]
    return sorted(name for name in names if "gloo" in name or "tcpstore" in name)

world = World.from_env()
collectives.init(world, 60, with_deepspeed="deepspeed" in sys.argv)
for module in sys.argv[2:]:
    __import__(module)
collectives.gather_objects(world.rank, world)
before = gloo_threads()
collectives.close()
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps([before, gloo_threads()]))
"""


@pytest.mark.parametrize("modules", [(), ("open_clip", "timm"), ("deepspeed",)])
def test_no_thread_of_the_group_is_left_after_close(tmp_path: Path, modules: tuple[str, ...]) -> None:
    assert run_ranks([sys.executable, "-c", RANK, str(tmp_path), *modules], 2, gpus=False) == 0
    for rank in range(2):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert any("gloo" in name for name in before)
        assert [name for name in after if "gloo" in name] == []


TRAINING = """
import sys
from pathlib import Path
from uniemox_dist.distributed import collectives

close = collectives.close

def and_list_threads():
    close()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    Path(sys.argv[1]).write_text("\\n".join(names))

collectives.close = and_list_threads
from uniemox_dist.cli.main import run
sys.exit(run(sys.argv[2:]))
"""


def test_a_run_that_imports_everything_itself_leaves_no_thread_of_the_group(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = [*TINY, f"run.dir={tmp_path}", "run.name=run", "run.max_steps=2", "batch.micro_batch=24"]
    data = [f"data.path={tiny_data}/train", "data.eval_path=null", f"teacher.name=local-dir:{tiny_teacher}"]
    command = [
        sys.executable,
        "-c",
        TRAINING,
        str(tmp_path / "threads"),
        "pretrain",
        "demo",
        *settings,
        *data,
    ]
    assert run_ranks(command, 1, gpus=False) == 0
    names = (tmp_path / "threads").read_text().splitlines()
    assert names
    assert [name for name in names if "gloo" in name] == []
