"""Kills a pack in this process, as a signal would between two records."""


class Killed(BaseException):
    """Not an Exception, so that nothing catches it."""


class KillAfter:
    """Progress that kills the pack after some records."""

    def __init__(self, records: int) -> None:
        self.total, self.left = 0, records

    def update(self, count: float | None = 1) -> bool | None:
        self.left -= int(count or 0)
        if self.left < 0:
            raise Killed
        return None
