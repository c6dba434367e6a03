"""All faults by name, in the order of the table."""

from collections.abc import Callable

from chaos_faults import data, disks, kills, numbers, stops
from chaos_faults.lab import Lab
from chaos_faults.verdict import Outcome

FAULTS: dict[str, Callable[[Lab], Outcome]] = {
    "1a": kills.one_rank,
    "1b": kills.all_ranks,
    "1c": kills.loader_worker,
    "2": kills.during_saves,
    "3a": disks.full,
    "3b": disks.read_only,
    "4": disks.bit_flip,
    **stops.all_stops(),
    "6": kills.hanging_rank,
    "7a": numbers.one_step,
    "7b": numbers.many_steps,
    "8a": data.gone,
    "8b": data.altered,
    "9a": disks.metrics_full,
    "9b": disks.no_tensorboard,
    "10": kills.always_dies,
}
ESSENTIAL = ("1a", "2", "4", "5-usr2-step", "6", "7a")
"""Faults that every change must survive; the others take longer or need the right to mount."""


def described(name: str) -> str:
    """Describes a fault in one sentence."""
    return (FAULTS[name].__doc__ or "").strip().rstrip(".").splitlines()[0]
