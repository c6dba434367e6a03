"""Recipes, and ways to start a run: on this machine, and on clusters. Torch-free."""
