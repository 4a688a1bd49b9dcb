"""What travels between server and nodes, and how it is coded."""
