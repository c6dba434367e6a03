"""A run seen through its folder: events, history, status and the report page. Torch-free."""
