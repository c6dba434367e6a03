"""Pictures as files: accepted formats, completeness, orientation and pixels; the same for every command."""
