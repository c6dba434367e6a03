"""Near-copies within and across data sets: fingerprints, candidates, comparison of pixels, pairs and their page."""
