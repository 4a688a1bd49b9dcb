"""What ends a member's part in a round, or the round."""


class SecureError(ValueError):
    """What another side sent contradicts the protocol, or too few answered."""
