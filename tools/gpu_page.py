"""Writes the page of gpu_check.py from its results: the aims with what was measured, then a section for each part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_parts import MASKS, VIT_B, VIT_L, case_of, list_cases

from uniemox_dist.core.formatting import duration

Part = Mapping[str, Any]
NOT_RUN = "not run"
TEACHERS = ("live", "cached")


@dataclass(frozen=True)
class Verdict:
    """What was measured for an aim."""

    aim: str
    measured: str
    result: str
    """Whether it was reached, or not run."""


@dataclass(frozen=True)
class Step:
    """One measured step: a case with one teacher."""

    case: tuple[str, str, str, str]
    micro_batch: int
    teacher: str
    share: float
    samples_per_s: float
    peak_bytes: float | None
    planned_bytes: float

    @property
    def deviation(self) -> float | None:
        """How far the plan is from the measured memory, as a share of it."""
        return None if self.peak_bytes is None else self.planned_bytes / self.peak_bytes - 1


def make_page(found: Mapping[str, Any]) -> str:
    """Returns the page as Markdown."""
    parts = {part["name"]: part for part in found["parts"]}
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    where = f"{machine['gpu']}, {machine['gpu_bytes'] / 1e9:.0f} GB" if machine["gpu"] else "no GPU"
    lines = [
        "# GPU check",
        "",
        f"{where}; {machine['cores']} cores; CUDA {machine['cuda']}, Python {machine['python']}, {versions}. "
        f"{duration(found['seconds'])} of at most {duration(60 * found['minutes'])}.",
        "",
    ]
    if found["tiny"]:
        lines += [
            "**Tiny models on CPUs: this page shows that the script works. Its figures mean nothing.**",
            "",
        ]
    steps = list_steps(parts)
    rows = [(v.aim, v.measured, v.result) for v in judge(parts, steps, tiny=found["tiny"])]
    lines += ["## Aims", "", *table(("aim", "measured", ""), rows)]
    lines += ["## Parts", "", *table(("part", "state", "seconds", "remark"), map(_part_row, parts.values()))]
    for name, part in parts.items():
        if name == "more-steps":
            continue  # its cases are in the table of `steps`
        lines += [f"## {part['title']} (`{name}`)", ""]
        missing = part["state"] in (NOT_RUN, "running") and not part.get("result")
        lines += [f"{_state(part)}.", ""] if missing else SECTIONS[name](parts, steps)
        if part.get("tail"):
            lines += [f"{_state(part)}. Its last lines:", "", "```", *part["tail"], "```", ""]
    return "\n".join(lines)


def table(header: Sequence[str], rows: Any) -> list[str]:
    """Returns a Markdown table, followed by an empty line."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    body = [f"| {' | '.join(row)} |" for row in [list(header), ["---"] * len(header), *cells]]
    return [*body, ""]


def list_steps(parts: Mapping[str, Part]) -> list[Step]:
    """Returns all measured steps."""
    found = []
    for row in _step_rows(parts):
        for teacher in TEACHERS:
            if teacher in row:
                at = row[teacher]
                rates = (at["share_of_matrix_rate"], at["samples_per_s"], at["peak_bytes"])
                found.append(Step(case_of(row), row["micro_batch"], teacher, *rates, at["planned_bytes"]))
    return found


def judge(parts: Mapping[str, Part], steps: Sequence[Step], *, tiny: bool) -> list[Verdict]:
    """Compares what was measured with the aims."""
    found = [
        _judge_tests(parts),
        _judge_rate(steps, "ViT-L from micro-batch 256 on: 50 %", VIT_L, ("256", "largest"), 0.5),
        _judge_rate(steps, "ViT-B at micro-batch 64: 35 %", VIT_B, ("64",), 0.35),
        _judge_data_wait(parts),
        _judge_plan(steps, "off"),
        _judge_plan(steps, "on"),
    ]
    if tiny:
        return [Verdict(v.aim, v.measured, v.result if v.result == NOT_RUN else "not judged") for v in found]
    return found


def _judge_tests(parts: Mapping[str, Part]) -> Verdict:
    aim, part = "all tests pass", parts["tests"]
    result = part.get("result")
    if not result or not sum(result[key] for key in ("passed", "failed", "error")):
        return Verdict(aim, "–", NOT_RUN)
    bad = result["failed"] + result["error"]
    text = f"{result['passed']} passed, {bad} failed"
    if part["state"] != "done" and not bad:
        return Verdict(aim, f"{text}; {_state(part)}", "not reached")
    return Verdict(aim, text, "not reached" if bad else "reached")


def _judge_rate(
    steps: Sequence[Step], aim: str, model: str, micro_batches: Sequence[str], share: float
) -> Verdict:
    """Judges the share of the matrix rate in all settings; in each the faster of compiled or not counts."""
    aim += " of the matrix rate"
    best: dict[tuple[str, str, str], float] = {}
    for step in steps:
        if step.case[0] == model and step.case[2] in micro_batches:
            key = (step.case[1], step.case[2], step.teacher)
            best[key] = max(best.get(key, 0.0), step.share)
    if not best:
        return Verdict(aim, "–", NOT_RUN)
    slowest = min(best, key=lambda key: best[key])
    fastest = max(best, key=lambda key: best[key])
    text = f"{100 * best[slowest]:.0f} % ({_name(slowest)})"
    if fastest != slowest:
        text += f" to {100 * best[fastest]:.0f} % ({_name(fastest)})"
    reached = sum(found >= share for found in best.values())
    count = len(MASKS) * len(micro_batches) * len(TEACHERS)
    if reached < len(best):
        return Verdict(aim, text, f"not reached in {len(best) - reached} of {count}")
    return Verdict(
        aim, text, "reached" if reached == count else f"reached in {reached} of {count}; others not run"
    )


def _name(key: tuple[str, str, str]) -> str:
    return f"mask {key[0]}, micro-batch {key[1]}, {key[2]}"


def _judge_data_wait(parts: Mapping[str, Part]) -> Verdict:
    aim, result = "data wait 0 %", parts["pretrain"].get("result") or {}
    if "data_wait_share" not in result:
        return Verdict(aim, "–", NOT_RUN)
    share = 100 * result["data_wait_share"]
    return Verdict(aim, f"{share:.1f} %", "reached" if share < 0.5 else "not reached")


def _judge_plan(steps: Sequence[Step], compiles: str) -> Verdict:
    aim = f"`uniemox plan` within 5 % of the memory, compile {compiles}"
    found = [step.deviation for step in steps if step.deviation is not None and step.case[3] == compiles]
    if not found:
        return Verdict(aim, "–", NOT_RUN)
    text = f"{100 * min(found):+.1f} % to {100 * max(found):+.1f} % in {len(found)} steps"
    return Verdict(aim, text, "reached" if max(map(abs, found)) <= 0.05 else "not reached")


def _part_row(part: Part) -> tuple[str, str, str, str]:
    seconds = f"{part['seconds']:.0f}" if "seconds" in part else "–"
    return f"`{part['name']}`", part["state"], seconds, part.get("reason", "")


def _state(part: Part) -> str:
    reason = part.get("reason")
    return f"{part['state']}: {reason}" if reason else str(part["state"])


def _step_rows(parts: Mapping[str, Part]) -> list[Mapping[str, Any]]:
    """Rows of both parts that measure steps; of a case that the first did not reach, the row of the second."""
    rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for name in ("steps", "more-steps"):
        for row in (parts[name].get("result") or {}).get("rows", ()):
            rows[case_of(row)] = row
    return list(rows.values())


def _tests_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    result = parts["tests"]["result"]
    counts = ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "error", "skipped"))
    return [f"{counts}.", "", *(f"- {test}" for test in result["bad"]), *[""] * bool(result["bad"])]


def _steps_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    found = {**(parts["more-steps"].get("result") or {}), **parts["steps"]["result"]}
    lines = []
    if found.get("matrix_tflops"):
        lines = [f"Products of bf16 matrices: {found['matrix_tflops']:.4g} TFLOP/s measured.", ""]
    by_case = {(step.case, step.teacher): step for step in steps}
    rows = []
    for row in _step_rows(parts):
        case = case_of(row)
        micro_batch = str(row.get("micro_batch", case[2])) + (" (largest)" if case[2] == "largest" else "")
        about = (case[0].removesuffix("_patch16_224"), case[1], micro_batch, case[3])
        problem = row.get("failed") or row.get("not_run")
        if problem:
            rows.append((*about, "–", "–", "–", "–", "–", problem))
            continue
        too_large = row.get("too_large_though_planned")
        for teacher in TEACHERS:
            step = by_case[case, teacher]
            peak = "–" if step.peak_bytes is None else f"{step.peak_bytes / 1e9:.2f} GB"
            off = "–" if step.deviation is None else f"{100 * step.deviation:+.1f} %"
            remark = f"first step {row[teacher]['first_step_s']:.1f} s" if case[3] == "on" else ""
            if too_large:
                remark += f" {too_large} was out of memory, although the plan has it fit"
            rates = (f"{step.samples_per_s:.0f}", f"{100 * step.share:.0f} %")
            rows.append((*about, teacher, *rates, peak, off, remark.strip()))
    header = ("encoder", "mask", "micro-batch", "compile", "teacher", "samples/s", "of matrix rate")
    lines += table((*header, "memory", "plan", ""), rows)
    done = {case_of(row) for row in _step_rows(parts)}
    left = [case for case in list_cases("tiny" in {case[0] for case in done}) if case not in done]
    if left:
        lines += [f"Not reached: {'; '.join(' '.join(case) for case in left)}.", ""]
    return lines


def _pretrain_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    result = parts["pretrain"]["result"]
    if "samples_per_s" not in result:
        return ["The run ended before anything was measured.", ""]
    mfu = "" if result.get("mfu") is None else f", {100 * result['mfu']:.0f} % of the stated peak"
    lines = [
        f"{result['samples_per_s']:.0f} samples/s ({result['tflops_per_s']:.3g} TFLOP/s{mfu}) over {result['steps']} "
        f"steps with {result['workers']} loader processes; data wait {100 * result['data_wait_share']:.2f} %, in the "
        f"slowest interval {100 * result['data_wait_share_max']:.2f} %.",
        "",
    ]
    if result.get("start_s"):
        times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["start_s"].items())
        lines += [f"Seconds of the start: {times}.", ""]
    for save in result["saves"]:
        size, waited = f"{save['bytes'] / 1e9:.2f} GB", f"{save['blocked_s']:.2f} s"
        lines += [
            f"Save after step {save['step']}: {size} in {save['seconds']:.2f} s; training waited {waited}.",
            "",
        ]
    return lines


def _saves_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    result = parts["saves"]["result"]
    if "blocked_share" not in result:
        return [f"{_state(parts['saves'])}.", ""]
    slower = "not known" if result["slower"] is None else f"{100 * result['slower']:+.1f} %"
    rows = [
        ("checkpoint", f"{result['checkpoint_bytes'] / 1e9:.2f} GB"),
        ("synchronous save", f"{result['synchronous_s']:.3f} s"),
        ("asynchronous save, training waits", f"{result['asynchronous_blocked_s']:.3f} s"),
        ("share of a synchronous save", f"{100 * result['blocked_share']:.1f} %"),
        ("written", f"{result['written_bytes_per_s'] / 1e9:.2f} GB/s"),
        ("of the disk", f"{100 * result['share_of_disk']:.0f} %"),
        ("steps beside a save", slower),
    ]
    return table(("", ""), rows)


def _embed_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    rates = parts["embed"]["result"].get("rates", {})
    rows = [(name, f"{sorted(values)[len(values) // 2]:.0f}") for name, values in rates.items()]
    return table(("", "pictures/s"), rows) if rows else [f"{_state(parts['embed'])}.", ""]


def _decode_section(parts: Mapping[str, Part], steps: Sequence[Step]) -> list[str]:
    result = parts["decode"]["result"]
    if "samples_per_s" not in result:
        return [f"{_state(parts['decode'])}.", ""]
    rates = result["samples_per_s"]
    rows = [
        ("CPU, one thread", rates["a"]),
        (f"CPU, {result['workers']} loader processes", rates["b"]),
        (f"{result['device']}, picture by picture", rates["c"]),
        (f"{result['device']}, a micro-batch at once", rates["d"]),
    ]
    pixels = result["pixels"]
    differ = [name for name, row in result["refusals"].items() if row["cpu"] != row["gpu"]]
    return [
        *table(("", "samples/s"), [(name, f"{rate:.0f}") for name, rate in rows]),
        f"Views differ by {pixels['mean']:.3f} grey levels on average and at most by {pixels['max']}, over "
        f"{pixels['pictures']} pictures; in {pixels['pictures_above_8']} of them a value differs by more than 8.",
        "",
        f"Only one of the two accepts: {', '.join(differ) or 'none of the unusual pictures'}.",
        "",
    ]


SECTIONS: dict[str, Callable[[Mapping[str, Part], Sequence[Step]], list[str]]] = {
    "tests": _tests_section,
    "steps": _steps_section,
    "pretrain": _pretrain_section,
    "saves": _saves_section,
    "embed": _embed_section,
    "decode": _decode_section,
}
