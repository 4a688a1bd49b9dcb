"""Tasks: text in, token arrays and labels out; and who owns which examples."""
