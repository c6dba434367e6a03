"""A run's report: what stands of its metrics, drawn (curves.py), and one HTML page (page.py). Torch-free."""
