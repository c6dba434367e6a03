import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from uniemox_dist.checkpoints.retention import clear_unfinished, list_superfluous, prune


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"step_{step:08d}"
        path.mkdir(parents=True)
        info = {"format": "uniemox-checkpoint", "format_version": 1, "step": step, "files": {}}
        (path / "complete.json").write_text(json.dumps(info))


def test_the_last_and_every_nth_are_kept() -> None:
    steps = range(10, 101, 10)
    assert list_superfluous(steps, 2) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert list_superfluous(steps, 2, 30) == [10, 20, 40, 50, 70, 80]
    assert list_superfluous(steps, 100) == []
    assert list_superfluous([], 3) == []


@given(
    st.sets(st.integers(1, 10**6)),
    st.integers(0, 9),
    st.none() | st.integers(1, 50),
)
def test_the_newest_checkpoint_is_kept_and_pruning_twice_deletes_nothing_more(
    steps: set[int], keep_last: int, keep_every: int | None
) -> None:
    doomed = list_superfluous(steps, keep_last, keep_every)
    assert not steps or max(steps) not in doomed
    assert list_superfluous(steps - set(doomed), keep_last, keep_every) == []


def test_pruning_deletes_only_complete_checkpoints_beyond_the_policy(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4, 5)
    (tmp_path / "step_00000002" / "complete.json").unlink()  # not complete: not ours to judge
    (tmp_path / "step_00000001.damaged").mkdir()
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, 1, 3) == ["step_00000001", "step_00000004"]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_00000002", "step_00000003", "step_00000005", "step_00000001.damaged", "notes"}


def test_only_what_a_killed_save_or_deletion_left_is_cleared(tmp_path: Path) -> None:
    make(tmp_path, 7)
    for name in (".step_00000008.tmp", ".step_00000001.deleted", ".step_00000009.mine", "step_00000009"):
        (tmp_path / name).mkdir()
    assert clear_unfinished(tmp_path) == [".step_00000001.deleted", ".step_00000008.tmp"]
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000007", ".step_00000009.mine", "step_00000009"}
