"""The folder of a Flower app that imports the installed package."""

import re
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from flwr.common.config import unflatten_dict

from slora_flwr import __version__
from slora_flwr.config import Value, list_keys, parse, refuse

_PACKAGE = "slora-flwr"
# What Flower's commands and its Hub take as the name of an app and of a publisher.
_NAME = re.compile("[A-Za-z][A-Za-z0-9-]{0,31}")
_NAMES = "1 to 32 letters, digits and hyphens, a letter first"
_APP = '''"""The Flower {kind}."""

from slora_flwr.engines.{module} import app

__all__ = ["app"]
'''
_UV = """\
# `flwr run` leaves this file out of the app's bundle. A uv.toml switches off [tool.uv]
# of the pyproject.toml beside it, so here uv installs every dependency.
"""
_COMMENT = """\
# Flower runs `uv sync` on the app's bundle before every run. There, this tells uv that
# what the app needs is installed. Without these lines it would install PyTorch again,
# for each run.
"""
_README = """\
---
tags: [fine-tuning, peft, lora, slora, text]
dataset: [your own text, docstrings of the Python standard library]
framework: [torch, transformers, peft]
---

# {name}

Federated fine-tuning of transformers by SLoRA
([arXiv 2308.06522](https://arxiv.org/abs/2308.06522)) and the methods it is compared
with. This folder holds the settings; the code is the Python package
[slora-flwr]({home}).

## Run it

```bash
pip install -e .
flwr run . --stream
```

On Linux, pip takes PyTorch with CUDA, gigabytes to download; without a GPU, install
PyTorch's build for CPUs first.

As it is, the app fine-tunes a small model that comes with slora-flwr on the docstrings
of Python's standard library, split very unevenly over 20 simulated clients. It
downloads nothing and takes about two minutes on 2 cores. The run prints its directory,
which holds the accuracy, every byte sent, and the trained adapter. `slora report`
writes a page about it.

## Change it

Every setting stands in `pyproject.toml`, below `[tool.flwr.app.config]`, and can be set
for one run:

```bash
flwr run . --stream --run-config "method='lora' rounds=5 clients.alpha=0.5"
```

`slora config` prints all settings with what they mean, and `slora plan` what a run
would train, send and need in memory. For your own text, give `data.name` the path of a
csv file with columns `text` and `label`, and `model.name` a model of the Hugging Face
Hub.

## On real machines

Every SuperNode, and the machine of the ServerApp, needs slora-flwr in the environment
in which Flower starts apps: `pip install "slora-flwr~={version}"`.
[Its documentation]({home}/tree/main/docs) has Docker and Kubernetes, each node's own
data, privacy, and what was measured.
"""


def is_app(folder: Path) -> bool:
    """Return whether a folder holds a Flower app of slora-flwr."""
    path = folder / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or Flower could not read it either
        return False
    app = project.get("tool", {}).get("flwr", {}).get("app", {})
    return "method" in app.get("config", {})


def write_app(
    folder: Path,
    values: Mapping[str, Value],
    name: str = "",
    publisher: str = "local",
) -> None:
    """Write the folder of an app, which runs with `flwr run FOLDER`.

    Parameters
    ----------
    folder : Path
        A new or empty folder.
    values : Mapping[str, Value]
        Flat run config values that differ from the defaults.
    name : str
        The app's name; empty for that of the folder.
    publisher : str
        Whoever publishes the app on Flower's Hub.

    Raises
    ------
    ConfigError
        If the folder holds files, or if a name or a value is not allowed.
    """
    name = name or folder.absolute().name
    for key, given in (("name", name), ("publisher", publisher)):
        if not _NAME.fullmatch(given):
            raise refuse(key, given, _NAMES)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise refuse("DIR", str(folder), "a new or empty folder")
    parse(values)
    folder.mkdir(parents=True, exist_ok=True)
    home = metadata.metadata(_PACKAGE).get_all("Project-URL") or []
    files = {
        "pyproject.toml": _pyproject(name, publisher, values),
        "server_app.py": _APP.format(kind="ServerApp", module="server_app"),
        "client_app.py": _APP.format(kind="ClientApp", module="client_app"),
        "README.md": _README.format(
            name=name,
            home=dict(url.split(", ", 1) for url in home)["Repository"],
            version=__version__,
        ),
        "LICENSE": _licence(),
        "uv.toml": _UV,
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")


@contextmanager
def app_folder(given: Path | None) -> Iterator[Path]:
    """Yield the folder of the app to run.

    Parameters
    ----------
    given : Path or None
        The folder. None for the current one if it holds an app, else for one that is
        made of the installed package and removed at the end.
    """
    if given is not None or is_app(Path()):
        yield given or Path()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, _PACKAGE)
        write_app(path, {}, publisher=_PACKAGE)
        yield path


def _pyproject(name: str, publisher: str, values: Mapping[str, Value]) -> str:
    flower = next(
        requirement.partition(";")[0].strip()
        for requirement in metadata.requires(_PACKAGE) or []
        if requirement.startswith("flwr[")
    )
    oldest = re.findall(r">=([\d.]+)", flower)[0]
    files = ["/server_app.py", "/client_app.py", "/README.md", "/LICENSE"]
    app: dict[str, Any] = {
        "publisher": publisher,
        "fab-format-version": 1,
        "flwr-version-target": oldest,
        # Not uv.toml: see there.
        "fab-include": files,
        "components": {
            "serverapp": "server_app:app",
            "clientapp": "client_app:app",
        },
        # Not as `flatten` has them, which resolves what depends on other keys.
        "config": unflatten_dict({k.name: k.default for k in list_keys()} | {**values}),
    }
    project: dict[str, Any] = {
        "build-system": {
            "requires": ["hatchling"],
            "build-backend": "hatchling.build",
        },
        "project": {
            "name": name,
            "version": __version__,
            "description": "Federated fine-tuning of transformers with slora-flwr",
            "readme": "README.md",
            "license": {"file": "LICENSE"},
            "requires-python": metadata.metadata(_PACKAGE)["Requires-Python"],
            # Flower's checks ask for flwr by a lower bound.
            "dependencies": [flower, f"{_PACKAGE}~={__version__}"],
        },
        # What is installed are the dependencies; Flower bundles the files.
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"bypass-selection": True}}}},
            "flwr": {"app": app},
        },
    }
    uv = {"dependency-metadata": [{"name": name, "version": "0", "requires-dist": []}]}
    return f"{tomli_w.dumps(project)}\n{_COMMENT}{tomli_w.dumps({'tool': {'uv': uv}})}"


def _licence() -> str:
    """Return the licence's text, which is installed with the package."""
    text = metadata.distribution(_PACKAGE).read_text("licenses/LICENSE")
    if text is None:
        raise FileNotFoundError(f"{_PACKAGE} is installed without its licence")
    return text
