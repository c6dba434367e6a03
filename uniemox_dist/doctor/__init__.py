"""Preflight: what of a node, or of an allocation, would stop or slow a run. Measuring is apart from judging."""
