"""What a node does: answer messages, train its clients, send their updates."""
