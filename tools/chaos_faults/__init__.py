"""Real faults in real runs, for `tools/chaos.py` and tests. CPU only: two ranks on one machine."""
