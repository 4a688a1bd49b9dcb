"""What a run says: progress lines and the closing table."""
