"""The files of a run directory, for their writer and their readers."""
