"""Every state of squeue, sacct and scontrol belongs to one phase."""

import pytest

from uniemox_dist.scheduler.states import PHASES, Phase, find_phase

WAITING = "PENDING CONFIGURING POWER_UP_NODE REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT EXPEDITING"
RUNNING = "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED UPDATE_DB"
ENDED = (
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED RECONFIG_FAIL "
    "REVOKED TIMEOUT"
)
SQUEUE = (
    "BOOT_FAIL CANCELLED COMPLETED CONFIGURING COMPLETING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED "
    "RUNNING RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED "
    "SUSPENDED TIMEOUT"
)
"""All states that squeue(1) documents."""


@pytest.mark.parametrize(
    ("words", "expected"), [(WAITING, Phase.WAITING), (RUNNING, Phase.RUNNING), (ENDED, Phase.ENDED)]
)
def test_each_state_has_its_phase(words: str, expected: Phase) -> None:
    assert {word for word, found in PHASES.items() if found is expected} == set(words.split())


def test_the_table_holds_every_state_of_squeue() -> None:
    assert len(SQUEUE.split()) == 24
    assert set(SQUEUE.split()) <= set(PHASES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CANCELLED by 1000", Phase.ENDED),
        ("CANCELLED+", Phase.ENDED),
        ("running", Phase.RUNNING),
        ("A_LATER_SLURM", Phase.RUNNING),
        ("", Phase.RUNNING),
    ],
)
def test_other_spellings_and_unknown_states(text: str, expected: Phase) -> None:
    assert find_phase(text) is expected
