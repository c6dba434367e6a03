"""Reading every byte of checkpoints again. Torch-free."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from uniemox_dist.checkpoints.folders import Checkpoint, file_problem


@dataclass(frozen=True)
class Verdict:
    """What was found in a checkpoint."""

    checkpoint: Checkpoint
    problems: tuple[str, ...]
    """One for complete.json, if it was altered, and for each file that has not the size and SHA-256 stated there."""
    gone: bool = False
    """Whether it was deleted meanwhile, by the retention of a run that trains."""


def verify(
    checkpoints: Sequence[Checkpoint], *, workers: int, read: Callable[[int], object] = lambda _: None
) -> Iterator[Verdict]:
    """Hashes all files of checkpoints in threads; `read` is told of each file's bytes when it is done."""
    with ThreadPoolExecutor(workers) as pool:

        def one(checkpoint: Checkpoint, name: str) -> str | None:
            facts = checkpoint.info["files"][name]
            problem = file_problem(checkpoint.folder / name, facts, hashes=True)
            read(facts["bytes"])
            return problem

        jobs = [(c, [pool.submit(one, c, name) for name in c.info["files"]]) for c in checkpoints]
        try:
            for checkpoint, futures in jobs:
                found = [checkpoint.own_problem(), *(future.result() for future in futures)]
                problems = tuple(problem for problem in found if problem is not None)
                gone = bool(problems) and not checkpoint.folder.is_dir()
                yield Verdict(checkpoint, () if gone else problems, gone)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupted command need not read the rest
