"""Runs with secrets in the environment, which test_secrets starts as one process.

Arguments: the config of a run that succeeds, as JSON, and a folder for the others.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from huggingface_hub import constants

# Its handler is made on import, and outside of CliRunner writes to the real stderr.
from huggingface_hub.utils import logging as hub_logging
from typer.testing import CliRunner

from slora_flwr.backbone.load import load_backbone
from slora_flwr.cli import app
from slora_flwr.client import handlers as node
from slora_flwr.config import ModelConfig, Value
from slora_flwr.studies.runner import StudyRun, _run_inline

Config = dict[str, Value]


def slora(*arguments: str) -> None:
    done = CliRunner().invoke(app, arguments)
    print("status", done.exit_code, done.output)


def run(config: Config, **changes: Any) -> None:
    config = config | {key.replace("_", "."): value for key, value in changes.items()}
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    slora("run", "--engine", "inline", "--nodes", "2", "-c", pairs)


def lacks_its_model(message: Message, context: Context) -> Message:
    load_backbone(ModelConfig("someone/of-a-node"), outputs=2, seed=0)
    raise AssertionError


def main() -> None:
    config: Config = json.loads(sys.argv[1])
    folder = Path(sys.argv[2])
    run(config)
    slora("report", str(config["run.dir"]))
    slora("compare", str(config["run.dir"]), "--out", str(folder / "out"))
    run(config, run_dir=str(folder / "1"), model_name="someone/model")
    run(config, run_dir=str(folder / "2"), data_name="someone/data")
    address = "https://somebody:marker-config@example.org/model?key=marker-query"
    for i, key in enumerate(("model_name", "data_name", "data_test", "run_resume")):
        run(config, **{"run_dir": str(folder / f"3-{i}"), key: address})
    # As in a study, which logs the traceback.
    failing = config | {"model.name": "someone/studied"}
    _run_inline(StudyRun(failing | {"run.dir": str(folder / "4")}, folder / "4"))
    node.HANDLERS["query"] = lacks_its_model
    run(config, run_dir=str(folder / "5"))
    asked = "http://somebody:marker-log@example.org/model"
    hub_logging.get_logger("huggingface_hub.utils._http").warning("asked %s", asked)
    # A password takes precedence over the token, so this address has none.
    plain = re.sub("//.*@", "//", constants.ENDPOINT)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(constants.ENDPOINT, plain)
    constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE = plain, template
    run(config, run_dir=str(folder / "6"), model_name="someone/by-token")


if __name__ == "__main__":
    main()
