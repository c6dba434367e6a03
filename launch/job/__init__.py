"""What happens inside a Slurm job. Torch-free; the batch script calls Slurm's commands."""
