"""Estimates of what a run needs and costs, as functions of its settings. Torch-free."""
