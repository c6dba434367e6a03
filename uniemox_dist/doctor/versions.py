"""Checks that package versions are within this package's bounds and equal on all ranks."""

import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from uniemox_dist.core.errors import install_command
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts

WHAT = "versions"
PACKAGE = "uniemox-dist"
SHOWN = ("python", PACKAGE, "torch", "deepspeed", "cuda", "nccl")
"""Packages that the finding names; the others are compared too."""
REMEDY = "use one environment on all nodes: the same container, or a virtual environment on a shared disk"


@dataclass(frozen=True)
class Bound:
    """A requirement of this package."""

    name: str
    specifier: str
    """The version bound, such as `>=2.11`."""
    extra: str
    """The extra that requires it; empty for the base install."""


@dataclass(frozen=True)
class VersionFacts:
    """The packages that a rank has installed."""

    versions: dict[str, str | None]
    """Version by package; None if it is missing. Includes python, and the cuda and nccl versions that torch was built
    with."""
    bounds: tuple[Bound, ...]
    """Bounds of packages. Empty if this package is not installed, because its metadata state them."""


def read_bounds(requirements: Iterable[str], python: str | None, extras: Sequence[str]) -> tuple[Bound, ...]:
    """The bounds in a package's metadata, of its base install and of some extras."""
    found = [Bound("python", python, "")] if python else []
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", text)
        if extra is None or extra[1] in extras:
            found.append(Bound(requirement.name, str(requirement.specifier), extra[1] if extra else ""))
    return tuple(found)


def measure(*, training: bool) -> VersionFacts:
    """Reads the metadata of installed packages without importing them; queries torch if it is imported already.

    With `training`, the packages that only training needs are included.
    """
    try:
        own = metadata.metadata(PACKAGE)
        (python,) = own.get_all("Requires-Python") or [None]
        stated = read_bounds(own.get_all("Requires-Dist") or [], python, ("train",) if training else ())
    except metadata.PackageNotFoundError:
        stated = ()
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (PACKAGE, "torch", "deepspeed", *(bound.name for bound in stated)):
        if name != "python":
            versions.setdefault(name, _installed(name))
    if "torch" in sys.modules:
        import torch

        versions["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return VersionFacts(versions, stated)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge(gathered: Sequence[RankFacts[VersionFacts]], *, bounds: bool = True) -> list[Finding]:
    """Fails for differences between ranks and, with `bounds`, for missing or too old packages."""
    usual: dict[str, str | None] = {}
    names = dict.fromkeys(name for _, facts in select_with_facts(gathered) for name in facts.versions)
    for name in names:
        counts = Counter(facts.versions.get(name) for _, facts in select_with_facts(gathered))
        usual[name] = counts.most_common(1)[0][0]

    def of_rank(_: RankFacts[VersionFacts], facts: VersionFacts) -> Problem | None:
        asked = facts.bounds if bounds else ()
        missing = [bound for bound in asked if facts.versions.get(bound.name) is None]
        if missing:
            names = ", ".join(bound.name for bound in missing)
            extra = next((bound.extra for bound in missing if bound.extra), "")
            return Problem("fail", f"not installed: {names}", f"run {install_command(extra or 'train')}")
        old = [bound for bound in asked if not _fits(str(facts.versions[bound.name]), bound)]
        if old:
            text = ", ".join(f"{b.name} {facts.versions[b.name]} (needs {b.specifier})" for b in old)
            names = " ".join(f'"{b.name}{b.specifier}"' for b in old if b.name != "python")
            remedy = f"pip install {names}" if names else "use a Python of that version"
            return Problem("fail", text, remedy)
        unlike = [name for name in usual if facts.versions.get(name) != usual[name]]
        if unlike:
            text = ", ".join(f"{n} {facts.versions.get(n)} (others: {usual[n]})" for n in unlike)
            return Problem("fail", text, REMEDY)
        if bounds and not facts.bounds:
            return Problem(
                "warn",
                f"{PACKAGE} is not installed, so its bounds are unknown; {_listed(facts)}",
                "pip install it",
            )
        return None

    return make_findings(
        WHAT, gathered, of_rank, lambda all_facts: _listed(all_facts[0]) + _same(len(all_facts))
    )


def _fits(version: str, bound: Bound) -> bool:
    try:
        return Requirement(f"x{bound.specifier}").specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True  # unknown


def _listed(facts: VersionFacts) -> str:
    there = [(name, facts.versions.get(name)) for name in SHOWN]
    return ", ".join(f"{name} {version}" for name, version in there if version is not None)


def _same(ranks: int) -> str:
    return f"; the same on all {ranks} ranks" if ranks > 1 else ""
