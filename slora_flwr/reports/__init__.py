"""Progress lines, tables and pages about runs."""
