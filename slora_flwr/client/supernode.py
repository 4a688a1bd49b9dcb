"""A SuperNode that polls more often than Flower's.

`python -m slora_flwr.client.supernode` takes the arguments of `flower-supernode` and
`--poll-seconds` (default 0.5). This is the longest pause between two requests for a
message, for which Flower pauses 3 seconds, and between two checks for the ClientApp's
reply. The SuperExec that the SuperNode starts polls for work as often, unless
FLWR_SUPEREXEC_TASK_POLL_INTERVAL is set. If SLORA_TRUSTED is set, it is the file of
`--trusted-entities`.
"""

import argparse
import os
import sys
import time
from typing import Any

from flwr.supernode import start_client_internal as main_loop
from flwr.supernode.cli import flower_supernode

_SUPEREXEC_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


class _Clock:
    """The module `time` with a limit on `sleep`."""

    def __init__(self, longest: float) -> None:
        self._longest = longest

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, self._longest))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    """Run `flower-supernode` with bounded pauses; Flower has no option for them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--poll-seconds", type=float, default=0.5)
    own, sys.argv[1:] = parser.parse_known_args()
    if not 0.01 <= own.poll_seconds <= 3:
        sys.exit(f"Error: --poll-seconds is {own.poll_seconds}; allowed: 0.01 to 3")
    if getattr(main_loop, "time", None) is not time:
        sys.exit(
            "Error: this version of Flower's SuperNode does not pause by time.sleep; "
            "use flower-supernode"
        )
    vars(main_loop)["time"] = _Clock(own.poll_seconds)
    if trusted := os.environ.get("SLORA_TRUSTED"):
        sys.argv += ["--trusted-entities", trusted]
    os.environ.setdefault(_SUPEREXEC_INTERVAL, str(own.poll_seconds))
    flower_supernode()


if __name__ == "__main__":
    main()
