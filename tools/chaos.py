"""Causes faults in real runs (`uniemox pretrain demo … --nproc 2`, tiny, on the CPU) and prints the cost of each: when
it was noticed, from which step the run continued, and how many steps and samples were lost or repeated.

Each run is compared with an undisturbed one: the samples of every slot with their views and masks, the losses, and the
final weights must be equal, bit for bit. Exit code 1 if a run did not survive its fault.

    python tools/chaos.py                      all faults, about 15 minutes on two cores
    python tools/chaos.py --only 1a 2 --kills 10
    python tools/chaos.py --list
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmark import make_parser, run_main
from chaos_faults.disks import NotPermitted
from chaos_faults.lab import Lab, Missed
from chaos_faults.processes import preload
from chaos_faults.registry import FAULTS, described
from chaos_faults.verdict import Outcome
from options import local_path, positive_int

from uniemox_dist.core.files import write_text

HEADER = ("fault", "noticed after", "recovered from", "steps lost", "samples lost", "doubled", "result")


def main() -> int:
    """Runs the tool."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults; 5 selects all 5-…")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument(
        "--kills", type=positive_int, default=3, help="how often a save is hit in fault 2 (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument(
        "--keep", type=local_path, metavar="FOLDER", help="work there and leave all runs to be looked at"
    )
    parser.add_argument("--no-mount", action="store_true", help="skip the faults that mount a file system")
    options = parser.parse_args()
    if options.list:
        for name in FAULTS:
            print(f"{name:22}{described(name)}")
        return 0
    names = chosen(options.only)
    unknown = [name for name in options.only or () if not chosen([name])]
    if unknown:
        parser.error(f"--only {unknown[0]}: no such fault; --list names them")
    preload()
    root = Path(options.keep or tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    lab = Lab(root.resolve(), options.seed, options.kills, not options.no_mount)
    began = time.monotonic()
    try:
        lab.prepare()
        outcomes = [cause(name, lab) for name in names]
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    print(table(outcomes))
    print(f"{len(outcomes)} faults in {(time.monotonic() - began) / 60:.1f} minutes")
    if options.json:
        write_text(options.json, json.dumps([o.as_json() for o in outcomes], indent=1) + "\n")
    return int(any(outcome.problems for outcome in outcomes))


def chosen(only: Sequence[str] | None) -> list[str]:
    """The names of the requested faults, in the order of the table."""
    return [n for n in FAULTS if only is None or any(n == o or n.startswith(f"{o}-") for o in only)]


def cause(name: str, lab: Lab) -> Outcome:
    """Causes a fault. Any exception becomes the row's result, so that the other faults still run."""
    began = time.monotonic()
    try:
        outcome = FAULTS[name](lab)
    except NotPermitted as error:
        outcome = Outcome(name, skipped=str(error))
    except Missed as error:
        outcome = Outcome(name, problems=[str(error)])
    except Exception as error:
        outcome = Outcome(name, problems=[f"{type(error).__name__}: {error}"])
    outcome.seconds = round(time.monotonic() - began, 1)
    print(f"{name}: {outcome.result} in {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    for problem in outcome.problems:
        print(f"    {problem}", file=sys.stderr, flush=True)
    return outcome


def table(outcomes: Sequence[Outcome]) -> str:
    """The rows as Markdown."""
    rows = [HEADER, tuple("---" for _ in HEADER)]
    for o in outcomes:
        noticed = "" if o.noticed_s is None else f"{o.noticed_s:.1f} s"
        recovered = "never stopped" if o.recovered_from is None else f"step {o.recovered_from}"
        result = o.result + ("; " + "; ".join([*o.problems, *o.notes]) if o.problems or o.notes else "")
        numbers = (str(o.steps_lost), str(o.samples_lost), str(o.samples_doubled))
        if o.skipped:
            noticed, recovered, numbers, result = "", "", ("", "", ""), f"skipped: {o.skipped}"
        rows.append((f"{o.fault} {described(o.fault)}", noticed, recovered, *numbers, result))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    run_main(main)
