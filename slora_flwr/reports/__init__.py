"""What runs say: progress lines, the closing table, pages on one and on many."""
