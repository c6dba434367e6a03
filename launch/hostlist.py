"""Slurm's node lists, for launchers; ranks read them too, and so they are told apart in `runtime`."""

from uniemox_dist.runtime.hostlist import expand

__all__ = ["expand"]
