"""Errors of a rank that only follow from the end of another one."""

import pytest

from uniemox_dist.core.errors import LOST_CONTACT, describe_lost_contact, is_lost_contact

SOURCE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
GLOO = "Read error [10.0.0.7]:31542: Connection reset by peer"
ADVICE = (
    ". This is typically caused by a remote worker hanging or bugs in the application. Check the logs of x."
)
GLOO_TIMEOUT = "Timed out waiting 1800000ms for recv operation to complete"
STORE = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by "
    "store->get('0'), but got error: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server "
    "shutdown or crash?"
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
    "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\n"
)
"""ncclGetErrorString(ncclRemoteError), and the explanation by torch's NCCLUtils; the reason of NCCL follows."""
SOCKET = "socketProgressOpt: Call to recv from 10.0.0.7<33759> failed : Connection reset by peer"
INFINIBAND = (
    "NET/IB : Got completion from peer 10.0.0.7<33956> with error 12, opcode 0, len 0, vendor err 129"
)
INTERNAL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, internal error, NCCL version 2.14.3\n"
    "ncclInternalError: Internal check failed.\nLast error:\n"
)
"""NCCL reports some remote errors as internal ones (NVIDIA/nccl issues 795 and 1514)."""
CLOSED = "Net : Connection closed by remote peer node7<50260>"
WATCHDOG = (
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=71, OpType=ALLREDUCE, NumelIn=9, "
    "NumelOut=9, Timeout(ms)=600000) ran for 600081 milliseconds before timing out."
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SOURCE + GLOO, GLOO),
        (f"{SOURCE}{GLOO}{ADVICE}", GLOO),
        (f"{SOURCE}{GLOO}\nException raised from x", GLOO),
        (SOURCE + "Connection closed by peer [10.0.0.7]:31542", "Connection closed by peer [10.0.0.7]:31542"),
        (SOURCE + GLOO_TIMEOUT, GLOO_TIMEOUT),
        ("Application timeout caused pair closure", "Application timeout caused pair closure"),
        (STORE, STORE.partition(". ")[0]),
        (NCCL + SOCKET, SOCKET),
        (NCCL + INFINIBAND, INFINIBAND),
        (NCCL.removesuffix("Last error:\n"), NCCL.splitlines()[0]),
        (INTERNAL + CLOSED, CLOSED),
        (WATCHDOG, WATCHDOG.rstrip(".")),
    ],
)
def test_lost_contact_keeps_the_reason_of_the_library(error: str, reason: str) -> None:
    assert is_lost_contact(error)
    text = describe_lost_contact(error)
    assert text == f"{LOST_CONTACT} ({reason})"
    assert is_lost_contact(text)


@pytest.mark.parametrize(
    "error", ["another rank is gone; its own fault, or the launcher, says why", LOST_CONTACT]
)
def test_events_of_all_versions_are_known(error: str) -> None:
    assert is_lost_contact(error)


@pytest.mark.parametrize(
    "error",
    [
        "",
        "RuntimeError: CUDA error: an illegal memory access",
        "NCCL error in: NCCLUtils.hpp:268, unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: x",
        "ncclInternalError: Internal check failed.\nLast error:\nNET/IB : No device found.",
        "Watchdog caught exception: CUDA error: unspecified launch failure",
    ],
)
def test_an_error_of_this_rank_is_not_lost_contact(error: str) -> None:
    assert not is_lost_contact(error)
