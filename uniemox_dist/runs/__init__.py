"""Reads and writes a run's folder: events, history, status and the report page. Torch-free."""
