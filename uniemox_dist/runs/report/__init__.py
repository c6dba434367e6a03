"""The HTML page about a run: the facts are collected in page.py and rendered by run.html.j2. Torch-free."""
