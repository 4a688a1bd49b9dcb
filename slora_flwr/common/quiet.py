"""What libraries say that no user can act on."""

import logging
import sys
import warnings


def quiet_bitsandbytes() -> None:
    """Leave out what bitsandbytes says at its import; call it before.

    On CPUs it says that a faster kernel is missing, at its import and then in some
    products; torch's compiler, which it imports, that a part of torch is deprecated.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:  # of PYTHONWARNINGS
        said = r"`torch\.jit\.script_method` is deprecated"
        warnings.filterwarnings("ignore", said, DeprecationWarning)


def quiet_mlflow() -> None:
    """Leave out what MLflow says as it makes a SQLite file; call it before.

    It tells of the tables that it makes, and SQLAlchemy that MLflow uses an old option.
    """
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    if not sys.warnoptions:
        said = r"The ``noload`` loader strategy is deprecated"
        warnings.filterwarnings("ignore", said, DeprecationWarning)
