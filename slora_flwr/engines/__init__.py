"""What drives both ends: the in-process grid, and Ray's workers."""
