"""Exit codes, and the one exception that means "the user can fix this". Standard library only."""

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_REQUEUE = 75
"""Pre-empted after a complete save (EX_TEMPFAIL): the launcher should queue the run again."""


class UserError(ValueError):
    """A user's mistake: one line naming field, value and fix; the command ends with exit code 2."""


class Fault(RuntimeError):
    """Something broke that no setting mends, and the message says all of it: one line, exit code 1."""


class LostPeer(Fault):
    """Another rank says, or said, why the run ends: the same of this one would only hide that in a job's main log."""


def missing_extra(package: str, extra: str) -> UserError:
    """The error for an import that an optional extra would have provided."""
    return UserError(f'{package} is not installed; install it with: pip install "uniemox-dist[{extra}]"')
