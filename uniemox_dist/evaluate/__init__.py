"""Measuring a release on held-out pictures, always beside trivial baselines. Loads without deepspeed."""
