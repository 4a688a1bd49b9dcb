"""The deployment as shipped, on a real Docker engine: `docker/test.sh`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Starts an engine, on a test machine that has this script and no engine running.
ENGINE = ROOT.parent / "shared" / "docker" / "engine.sh"
NO_ENGINE = 77


@pytest.mark.timeout(3600)
def test_the_deployment_as_shipped() -> None:
    running = (
        shutil.which("docker")
        and not subprocess.run(
            ["docker", "info"], capture_output=True, check=False
        ).returncode
    )
    if not running and ENGINE.is_file() and os.getuid() == 0:
        subprocess.run([ENGINE], check=True)
    done = subprocess.run(
        [ROOT / "docker" / "test.sh"],
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
    passed = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert [f"PASS {part}" for part in "abcde"] == [
        line for line in passed if line.startswith("PASS")
    ]
