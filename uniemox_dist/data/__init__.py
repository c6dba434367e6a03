"""From shards to micro-batches: the plan of samples, readers, views and the loader."""
