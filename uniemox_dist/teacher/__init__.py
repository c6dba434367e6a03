"""The frozen teacher and its caches of caption and view embeddings."""
