"""From shards to batches: a pure plan of samples, a reader by index, two views, and the loader."""
