"""The packing pipeline: listing, workers, journal, duplicates, captions and encoding."""
