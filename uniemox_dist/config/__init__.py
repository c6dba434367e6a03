"""The configuration: pydantic sections (schema.py) and the YAML + key=value loader (load.py). Torch-free."""
