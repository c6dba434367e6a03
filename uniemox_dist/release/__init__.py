"""Released checkpoints: consolidated, documented, and loadable without the system that trained them."""
