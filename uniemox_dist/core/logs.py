"""What a rank says, in its log and on the terminal. A log that cannot be written never ends a run."""

import logging
import socket
import sys
from pathlib import Path
from typing import TextIO

_reported: set[Path] = set()


def report_once(path: Path, error: BaseException | None) -> None:
    """Says on standard error, once for a file, that training goes on without it."""
    if path not in _reported:
        _reported.add(path)
        reason = getattr(error, "strerror", None) or error
        print(f"uniemox: warning: {path}: {reason}; training goes on without it", file=sys.stderr)


class _File(logging.FileHandler):
    """A log on a disk that is full costs its lines, and neither the run nor a traceback for each."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it was closed, and cannot be opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        report_once(Path(self.baseFilename), sys.exc_info()[1])


class _Screen(logging.StreamHandler[TextIO]):
    """A terminal that is gone, or a pipe that nobody reads, costs lines as well."""

    def handleError(self, record: logging.LogRecord) -> None:
        report_once(Path("standard output"), sys.exc_info()[1])


class Step(logging.Filter):
    """Gives each line of a log the step at which it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        record.step = "-" if self.now is None else self.now
        return True


def start_logging(folder: Path, rank: int, main: TextIO | None = None) -> Step:
    """Our logger: everything to <folder>/rank<rank>.log with time, rank and step, and what rank 0 says also to the
    terminal; errors of others to `main`, the main log of their job, if they have one. Returns what is told the step."""
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
    """Closes the log of this process in a folder; the terminal goes on to be told."""
    log = logging.getLogger("uniemox")
    for handler in [h for h in log.handlers if isinstance(h, _File)]:
        if Path(handler.baseFilename).parent == folder.absolute():
            log.removeHandler(handler)
            handler.close()
