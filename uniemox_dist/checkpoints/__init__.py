"""Sharded checkpoints at rest: which are complete, and reading them without the cluster that wrote them."""
