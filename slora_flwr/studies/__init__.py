"""Studies: many runs described by one file."""
