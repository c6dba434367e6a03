"""Exit codes, and the one exception that means "the user can fix this". Standard library only."""

import logging
import os
import re
import sys
from contextlib import suppress

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_REQUEUE = 75
"""Preempted after a complete save (EX_TEMPFAIL): the launcher should requeue the run."""


class UserError(ValueError):
    """A user's mistake: one line that names field, value and fix. The command ends with exit code 2."""


class Fault(RuntimeError):
    """A fault that no setting repairs, with a message that needs no traceback: one line, exit code 1."""


class LostPeer(Fault):
    """A rank ends because another rank ended, which reports the cause. This error is not written to the job's main
    log."""


def install_command(extra: str) -> str:
    """The command that installs an optional extra; this package is not on an index."""
    return f'pip install -e ".[{extra}]" in your clone of uniemox-dist'


def missing_extra(package: str, extra: str) -> UserError:
    """The error for a package that an optional extra installs."""
    return UserError(f"{package} is not installed; run {install_command(extra)}")


LOST_CONTACT = "lost contact with another rank; see that rank's log or the launcher's"
"""The error of a rank whose collective failed because another rank ended."""
LOST_CONTACT_PARTS = (
    "lost contact with another rank",
    "another rank is gone",  # in events of earlier versions
    # gloo, and the sockets below gloo and NCCL
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "application timeout caused pair closure",
    # torch's TCPStore, whose server is rank 0
    "connection was likely closed. did the remote server shutdown or crash",
    # NCCL, and torch's process group for it
    "ncclremoteerror",
    "remote process exited or there was a network error",
    "connection closed by remote peer",
    "watchdog caught collective operation timeout",
)
"""Parts of error texts, in lower case, that only report that another rank ended or does not answer."""


def is_lost_contact(error: str) -> bool:
    """Whether an error only reports that another rank ended or does not answer; only that rank knows the cause."""
    return any(part in error.lower() for part in LOST_CONTACT_PARTS)


def describe_lost_contact(error: str) -> str:
    """The text of a rank that lost contact: `LOST_CONTACT` with the library's reason, which may name the peer, the
    network device or the collective."""
    reason = error.rpartition("Last error:")[2].strip() or error.strip()  # NCCL puts its details last
    reason = re.sub(r"^\[\S+:\d+\] ", "", reason.splitlines()[0])  # gloo begins with a line of its source
    return f"{LOST_CONTACT} ({reason.partition('. ')[0].rstrip('.')})"  # gloo goes on with general advice


def exit_without_teardown(code: list[int]) -> None:
    """Ends this process with `code[0]` before Python tears its modules down; a handler for atexit.

    With torch loaded the teardown takes seconds, in which Slurm may kill the job before its batch script has decided
    what comes next. And it can fail: something may still hold a process group (DeepSpeed's engine does), and a thread
    of that group that needs the interpreter during the teardown aborts the process.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(code[0])
