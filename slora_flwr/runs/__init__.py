"""The files of a run directory, for their writer and all their readers."""
