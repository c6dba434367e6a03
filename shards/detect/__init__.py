"""Person detectors behind one interface."""
