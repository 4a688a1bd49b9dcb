"""The ServerApp's side: phases, rounds, nodes."""
