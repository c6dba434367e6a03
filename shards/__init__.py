"""Data at rest: samples, tar shards, indexes, manifests. Torch-free; FORMAT.md is the contract."""
