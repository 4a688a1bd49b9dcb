"""Lines, tables and pages that tell of runs."""
