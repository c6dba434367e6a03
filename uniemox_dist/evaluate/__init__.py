"""Evaluation of a release on held-out pictures, always beside trivial baselines. Needs no deepspeed."""
