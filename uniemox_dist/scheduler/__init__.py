"""Slurm's commands, job states, host lists and the allocation of a job, for Python. Torch-free."""
