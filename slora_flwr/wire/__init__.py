"""What travels: packed states, messages, and the ledger of their bytes."""
