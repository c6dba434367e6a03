"""Code that runs inside Slurm jobs, before and after the ranks. Torch-free; the batch script calls Slurm's
commands."""
