"""Faults that are really caused in real runs, for `tools/chaos.py` and tests. CPU only: two ranks of one machine."""
