"""Estimates of the resources and costs of a run, as functions of its settings. Torch-free."""
