"""Turns shards into micro-batches: the plan of samples, readers, views and the loader."""
