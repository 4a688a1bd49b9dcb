"""Lines that Flower prints around a run, and that no user can act on."""

import re

# Of flwr 1.41 and 1.42 and Ray 2.55: what is not here is shown. `slora run` sets the
# number of nodes, the app asks for no packages, and `num_gpus` is Flower's.
_KNOWN = (
    r"Using SuperLink: local \(127\.0\.0\.1:\d+\)",
    r"Starting logstream for run_id `\d+`",
    r"Starting Flower Simulation",
    r"Since flwr 1\.32, default simulated SuperNodes changed from 10 to 2\.",
    r"Federation `\S+` \(\d+ simulated SuperNodes\)",
    r"To change federation size, use the following command:",
    r"flwr federation simulation-config \S+ <superlink> --num-supernodes <N>",
    r"Successfully installed \S+ to \S+\.",
    r"Skipping `flwr` dependency from app requirements to avoid replacing the running "
    r"Flower installation\.",
    r"Created env for run in: .*",
    r"Installing application dependencies\.\.\.",
    r"uv sync took \d\.\d+ seconds\.",
    r"No additional application dependencies needed installation\.",
    r"App dependencies installed successfully via uv sync\.",
    r"Manually terminating ClientAppActor",  # at the end of each simulation
)
# Flower's last word is a level and nothing else.
_LINES = re.compile(
    r"(?:\(ClientAppActor pid=\d+\) )?(?:(?:INFO|WARNING) *:)?\s*"
    rf"(?:{'|'.join(_KNOWN)})|INFO *:\s*"
)
# What Ray tells whoever calls it without `num_gpus`, as Flower does.
RAY_TIP = r"Tip: In future versions of Ray, Ray will no longer override accelerator"


def is_noise(line: str) -> bool:
    """Return whether a line, without colours, is one that no user can act on."""
    return _LINES.fullmatch(line.rstrip()) is not None
