"""Sharded checkpoints: lists complete ones, and reads them on any number of ranks."""
