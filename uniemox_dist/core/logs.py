"""The log of a rank, in its file and on the terminal. A log that cannot be written never ends a run."""

import logging
import socket
import sys
from pathlib import Path
from typing import TextIO

_reported: set[Path] = set()


def report_once(path: Path, error: BaseException | None) -> None:
    """Prints once per file, on standard error, that training continues without it."""
    if path not in _reported:
        _reported.add(path)
        reason = getattr(error, "strerror", None) or error
        print(f"uniemox: warning: {path}: {reason}; training continues without it", file=sys.stderr)


class _File(logging.FileHandler):
    """A log file: a full disk costs its lines, without a traceback for each."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the file was closed and cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        report_once(Path(self.baseFilename), sys.exc_info()[1])


class _Screen(logging.StreamHandler[TextIO]):
    """A log on the terminal: a closed terminal or pipe costs its lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        report_once(Path("standard output"), sys.exc_info()[1])


class Step(logging.Filter):
    """Adds the present step to each line of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        record.step = "-" if self.now is None else self.now
        return True


def start_logging(folder: Path, rank: int, main: TextIO | None = None) -> Step:
    """Sets up the logger `uniemox` and returns the filter whose `now` is the present step.

    All lines go to <folder>/rank<rank>.log with time, rank and step; those of rank 0 also to the terminal, and errors
    of other ranks to `main`, the main log of their job, if they have one.
    """
    log = logging.getLogger("uniemox")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    step = Step()
    try:
        file = _File(folder / f"rank{rank}.log", encoding="utf-8")
    except OSError as error:
        report_once(folder, error)
    else:
        file.addFilter(step)
        file.setFormatter(
            logging.Formatter(f"%(asctime)s rank {rank} step %(step)s %(levelname)s %(message)s")
        )
        log.addHandler(file)
    if rank == 0:
        screen = _Screen(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(screen)
    elif main is not None:
        errors = _Screen(main)
        errors.setLevel(logging.ERROR)
        errors.setFormatter(
            logging.Formatter(f"rank {rank} on {socket.gethostname()}: uniemox: error: %(message)s")
        )
        log.addHandler(errors)
    return step


def stop_logging(folder: Path) -> None:
    """Closes this process's log in a folder; lines still go to the terminal."""
    log = logging.getLogger("uniemox")
    for handler in [h for h in log.handlers if isinstance(h, _File)]:
        if Path(handler.baseFilename).parent == folder.absolute():
            log.removeHandler(handler)
            handler.close()
