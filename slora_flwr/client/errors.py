"""The errors with which a node refuses an instruction."""


class MissingBaseError(LookupError):
    """The node lacks the base that an instruction names."""


class MissingStateError(LookupError):
    """The node lacks the state that an instruction's is a difference from."""


class MismatchError(RuntimeError):
    """The node's adapter or mask, or the base it was sent, is not the server's."""
