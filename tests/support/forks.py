"""Python programs that share their imports: each is forked from one process.

What a process of `slora` imports takes longer than what most tests have it do.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTS = (
    "datasets",
    "peft",
    "transformers.models.bert.modeling_bert",
    "slora_flwr.cli",
    "slora_flwr.client.handlers",
    "slora_flwr.engines.inline",
)


class Forks:
    """A process that has imported what `slora` does, and nothing of a run yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.support.forks import serve; serve()"],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(
        self, site: Path, code: str, *arguments: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as `python -c` does, with `site` on its path."""
        outputs = [self._folder / name for name in ("out", "err")]
        request = [str(site), code, arguments, [*map(str, outputs)]]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        told = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(arguments, status, *told)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _run(code: str) -> int:
    """Run a program; return the exit status that Python would."""
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Fork a process for each line, until there is none; answer its exit status."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what is not looked at is not copied
    for line in sys.stdin:
        site, code, arguments, outputs = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in enumerate(outputs, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.path.insert(0, site)
            sys.argv = ["-c", *arguments]
            # Without an interpreter's end, which would free all that was imported.
            os._exit(_run(code))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
