"""The events of a run: one class for each kind, with the fields that it writes to events.jsonl and its text.

To add a kind, define a class in `training` or `jobs` and write it with `RunFolder.write`. The terminal, the report page
and `uniemox status` then print its `describe`, and the page's timeline draws it if the class has a `lane`.
"""
