"""Slurm as seen from Python: its commands, job states, host lists and the allocation of a job. Torch-free."""
