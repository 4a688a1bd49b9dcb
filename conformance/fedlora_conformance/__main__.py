"""`python -m fedlora_conformance`: the runner."""

import sys

from fedlora_conformance.run import main

sys.exit(main())
