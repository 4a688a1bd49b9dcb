"""What libraries say at their import that no user can act on."""

import subprocess
import sys

import pytest

LOUD = "Failed to load CPU gemm_4bit_forward"
# With all warnings once, as Flower sets them before it loads an app.
IMPORTS = """\
import warnings
warnings.filterwarnings("once", category=DeprecationWarning)
{}
import peft
"""


def is_loud(module: str) -> bool:
    """Return whether anything is said as PEFT is imported after a module."""
    code = IMPORTS.format(module)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return "script_method" in done.stderr or LOUD in done.stderr


def test_bitsandbytes_says_nothing_as_peft_imports_it() -> None:
    pytest.importorskip("bitsandbytes")
    if not is_loud(""):
        pytest.skip("this version of bitsandbytes says nothing on this CPU")
    assert not is_loud("import slora_flwr.adapters")
