"""The process group ends with `close`, even if modules were imported while it existed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
collectives.init(world, 60)
for module in sys.argv[2:]:
    __import__(module)
collectives.gather_objects(world.rank, world)
before = gloo_threads()
collectives.close()
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps([before, gloo_threads()]))
"""


@pytest.mark.parametrize("modules", [(), ("open_clip", "timm")])
def test_no_thread_of_the_group_is_left_after_close(tmp_path: Path, modules: tuple[str, ...]) -> None:
    assert run_ranks([sys.executable, "-c", RANK, str(tmp_path), *modules], 2, gpus=False) == 0
    for rank in range(2):
        before, after = json.loads((tmp_path / f"{rank}.json").read_text())
        assert any("gloo" in name for name in before)
        assert [name for name in after if "gloo" in name] == []


COMMAND = """
import atexit, sys
from uniemox_dist.cli.main import main

class TornDown:
    def __del__(self):
        sys.__stdout__.write("torn down\\n")

kept = TornDown()
sys.argv = ["uniemox", *sys.argv[1:]]
import click

@click.command()
def ends() -> int:
    atexit.register(print, "atexit ran")
    print("said", end="")
    return 75

from uniemox_dist.cli import main as module
module.uniemox.add_command(ends, "ends")
module.LazyGroup.get_command = lambda self, context, name: ends
main()
"""


def test_a_command_ends_before_python_tears_down_its_modules() -> None:
    """Then threads of a process group that something holds, such as DeepSpeed's engine, cannot abort it."""
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, "ends"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (75, "saidatexit ran\n", "")
