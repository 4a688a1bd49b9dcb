"""The errors with which a node refuses an instruction."""


class MissingBaseError(LookupError):
    """The node lacks the base that an instruction names."""


class MissingStateError(LookupError):
    """The node lacks the state from which an instruction's is a difference."""


class MismatchError(RuntimeError):
    """The node's adapter or mask, or the base that came, is not the server's."""
