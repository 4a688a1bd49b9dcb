"""The deployment as shipped, on a real Docker engine: `docker/test.sh`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
# Starts an engine, on a test machine that has this script and no engine running.
ENGINE = ROOT.parent / "shared" / "docker" / "engine.sh"
NO_ENGINE = 77


def passed(*parts: str) -> list[str]:
    """Run parts of the script; give the names of those that passed."""
    running = (
        shutil.which("docker")
        and not subprocess.run(
            ["docker", "info"], capture_output=True, check=False
        ).returncode
    )
    if not running and ENGINE.is_file() and os.getuid() == 0:
        subprocess.run([ENGINE], check=False)  # without one the script below says so
    done = subprocess.run(
        [ROOT / "docker" / "test.sh", *parts],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode == NO_ENGINE:
        pytest.skip(done.stdout.strip())
    print(done.stdout)
    assert done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("PASS ")]
    return [line.removeprefix("PASS ").split(":")[0] for line in lines]


@pytest.mark.timeout(3600)
def test_one_host_as_shipped() -> None:
    assert passed() == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.timeout(1800)
def test_two_hosts_behind_slow_links() -> None:
    if os.getuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("a slow link takes root and /dev/net/tun")
    # The gate's refusal, then a run by each of three methods.
    assert passed("network") == ["network"] * 4
