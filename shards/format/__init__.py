"""The format of data at rest: samples, tars, indexes and manifests, as FORMAT.md describes."""
