"""What `slora run` prints of a run's log."""

import io
import re
import sys
import warnings
from collections.abc import Iterator

import pytest
from rich.console import Console

from slora_flwr.engines import ray_pool
from slora_flwr.engines.flower import show
from slora_flwr.reports.live_table import LiveTable
from tests.support.processes import wait_until

# As Flower's simulation prints them, before this app has been loaded.
NOISE = """\
Using SuperLink: local (127.0.0.1:39091)
\x1b[92mINFO \x1b[0m:      Starting logstream for run_id `11646280997549424866`
\x1b[92mINFO \x1b[0m:      Starting Flower Simulation
\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
\x1b[92mINFO \x1b[0m:      Federation `@none/default` (2 simulated SuperNodes)
\x1b[92mINFO \x1b[0m:      To change federation size, use the following command:
\x1b[92mINFO \x1b[0m:      \tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>
Successfully installed slora-flwr to /home/a/.flwr/apps/slora-flwr.0.1.0.958f3c16.
\x1b[93mWARNING \x1b[0m:   Skipping `flwr` dependency from app requirements to avoid replacing the running Flower installation.
\x1b[92mINFO \x1b[0m:      Created env for run in: /home/a/.flwr/runtime-envs/11646280997549424866
\x1b[92mINFO \x1b[0m:      Installing application dependencies...
\x1b[92mINFO \x1b[0m:      uv sync took 0.0 seconds.
\x1b[92mINFO \x1b[0m:      No additional application dependencies needed installation.
\x1b[92mINFO \x1b[0m:      App dependencies installed successfully via uv sync.
\x1b[92mINFO \x1b[0m:      \x20
(ClientAppActor pid=23504) \x1b[93mWARNING \x1b[0m:   Manually terminating ClientAppActor
""".splitlines(keepends=True)  # noqa: E501
SHOWN = [
    # What a user can act on, or what is not known.
    "Using SuperLink: cluster (10.0.0.7:8000)\n",
    "\x1b[92mINFO \x1b[0m:      uv sync took 312.4 seconds.\n",
    "\x1b[91mERROR \x1b[0m:     Starting Flower Simulation\n",
    "\x1b[93mWARNING \x1b[0m:   Federation `f` has no nodes\n",
    "\x1b[92mINFO \x1b[0m:      Starting Flower Simulation failed\n",
    "Traceback (most recent call last):\n",
    '  File "a.py", line 1\n',
    "(ClientAppActor pid=23504) \x1b[93mWARNING \x1b[0m:   no space left\n",
    "\n",
    "RuntimeError: \x1b[1mno\x1b[0m\n",
    "\x1b[92mINFO \x1b[0m:      round 1/2 sparse: 1 of 2 clients answered after 0:10\n",
]


def plain(lines: list[str]) -> str:
    text = "".join(lines)
    for code in ("0", "1", "91", "92", "93"):
        text = text.replace(f"\x1b[{code}m", "")
    return text


def test_only_known_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [line for pair in zip(NOISE, SHOWN * 2, strict=False) for line in pair]
    show(NOISE + SHOWN, None)
    assert capsys.readouterr().out == plain(SHOWN)  # and without colours
    show(mixed, None, verbose=True)
    assert capsys.readouterr().out == plain(mixed)


def test_a_terminal_shows_how_far_a_run_is_in_a_table_below_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    within = "INFO :      round 1/2 lora: {} of 9 clients answered after 0:{}\n"
    closed = "INFO :      round 1/2 lora   clients 9/9  loss 0.772  accuracy  50.0%  "
    closed += "0.10 MB  0:09 left\n"
    other = "INFO :      " + "a line that is longer than the terminal is wide " * 3

    def lines() -> Iterator[str]:
        yield within.format(2, 10)
        yield f"{other}\n"
        yield within.format(5, 20)
        wait_until(lambda: bool(re.search(r"1/2 +lora +5/9", shown.getvalue())))
        yield closed

    show(lines(), LiveTable(Console(force_terminal=True, width=80)))
    text = shown.getvalue()
    assert "answered" not in text
    assert "MB  0:09 left" not in text
    assert f"{other}\n" in text  # in one line, as it came
    # Once it ends, the closed round stays, and what was erased is followed by nothing.
    assert re.search(r"1/2 +lora +9/9 +0\.772 +50\.0% +0\.10 +0:09", text)
    assert "\x1b[2K" not in text.rpartition("9/9")[2]
    assert sys.stdout is shown


@pytest.mark.parametrize("asked", [[], ["default"]])
def test_rays_tip_is_told_only_if_warnings_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setattr(sys, "warnoptions", asked)
    monkeypatch.setitem(
        vars(ray_pool.raybackend), "BasicActorPool", ray_pool.BasicActorPool
    )
    tip = "Tip: In future versions of Ray, Ray will no longer override accelerator vi"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ray_pool.install()
        warnings.warn(tip, FutureWarning, stacklevel=1)
        warnings.warn("This Ray is too old", FutureWarning, stacklevel=1)
    assert len(told) == 1 + len(asked)


def test_ctrl_c_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would look like none, and nothing could be asked."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)

    def lines() -> Iterator[str]:
        yield "INFO :      round 1/2 lora: 2 of 9 clients answered after 0:10\n"
        assert sys.stdout is not shown
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show(lines(), LiveTable(Console(force_terminal=True, width=80)))
    assert sys.stdout is shown
