"""Held-out samples that are shown during training: reconstructions and nearest texts."""
