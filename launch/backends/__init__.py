"""Ways to start a submission: Slurm, submitit and this machine. Torch-free."""
