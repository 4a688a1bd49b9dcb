"""A run's export on the Hub, a stand-in of whose API the Hub's own client talks to."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from scipy.stats import norm

from slora_flwr.server.export import KeptState
from slora_flwr.training.trainer import Trainer
from tests.support.grids import RecordingGrid
from tests.support.hub import READ_TOKEN, TOKEN, USER, Hub
from tests.support.processes import free_port
from tests.support.runs import facts, make_config, start, summary
from tests.support.tiny import logits

REPO = f"{USER}/headlines"
# What may leave the server, by hand: of each, the methods' exports and the tokenizer.
MAY_BE_SENT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_over_patch.safetensors",
    "base_patch.safetensors",
    "classes.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Does as a README says, without slora_flwr, and writes the logits of examples.
AS_IT_SAYS = dedent(
    """
    import re, sys
    for name in ("slora_flwr", "slora_embedded"):
        sys.modules[name] = None
    import torch
    from safetensors.torch import load_file, save_file
    readme, examples, to = sys.argv[1:]
    given = {}
    code = re.findall(r"```python\\n(.*?)```", open(readme).read(), re.DOTALL)
    exec("\\n".join(code), given)
    batch = load_file(examples)
    with torch.no_grad():
        out = given["model"].eval()(**batch).logits
    save_file({"logits": out.float().contiguous()}, to)
    """
)


@pytest.fixture(scope="module")
def runs(
    corpus: Path,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The directories of finished runs."""
    made = {}
    for method in ("lora", "slora"):
        place = tmp_path_factory.mktemp(method) / "run"
        config = make_config(corpus, tiny_models["bert"], place)
        config |= {"method": method, "train.lr": 0.02}
        made[method] = start(config, RecordingGrid(config))
    return made


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def push(
    environment: Mapping[str, str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "slora", "push", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_pushed_is_the_dry_runs_and_has_the_runs_logits(
    runs: dict[str, Path], hub: Hub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path / "home")
    for name, arguments in (("lora", []), ("slora", []), ("slora", ["--merge"])):
        where = tmp_path / f"{name}{len(arguments)}"
        where.mkdir()
        folder = where / "dry"
        done = push(environment, runs[name], REPO, *arguments, "--dry-run", folder)
        assert done.returncode == 0, done.stderr
        assert "Nothing was sent" in done.stdout
        expected = read(folder)
        for file, content in expected.items():
            assert f"{len(content):,}  {file}" in done.stdout
        assert expected.keys() <= MAY_BE_SENT
        done = push(environment, runs[name], REPO, *arguments)
        assert done.returncode == 0, done.stderr
        assert f"{hub.address}/{REPO} (private), commit " in done.stdout
        # And nothing of the one before.
        assert hub.files[REPO] == expected

        (where / tiny_models["bert"].name).symlink_to(tiny_models["bert"])
        (where / "README.md").write_bytes(hub.files[REPO]["README.md"])
        kept = KeptState.read(runs[name], "averaged")
        kept.model.adapter.load(kept.state)
        test = Trainer(kept.config).data.tokenised.test
        ids, mask, _ = test.batch(np.arange(len(test)))
        batch = {"input_ids": ids, "attention_mask": mask.to(torch.int64)}
        save_file(batch, where / "examples")
        subprocess.run(
            [sys.executable, "-P", "-c", AS_IT_SAYS, "README.md", "examples", "logits"],
            cwd=where,
            env={**os.environ, **environment},
            check=True,
        )
        found = load_file(where / "logits")["logits"]
        own = logits(kept.model.backbone.model, test)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    assert hub.private == {REPO: True}
    assert hub.commits[REPO] == ["Upload by slora push"] * 3


def test_files_that_are_no_exports_stay(
    runs: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    stays, goes = {"LICENSE": b"MIT"}, {"old.safetensors": b"", "old.json": b"{}"}
    hub.make(REPO, private=False, **stays, **goes)
    environment = hub.environment(tmp_path)
    refused = push(environment, runs["lora"], REPO)
    assert refused.returncode == 2
    assert f"REPO is {REPO}, which is public; allowed: a private" in refused.stderr
    assert hub.files[REPO] == stays | goes
    done = push(environment, runs["lora"], REPO, "--public")
    assert done.returncode == 0, done.stderr
    assert "(public)" in done.stdout
    assert stays.items() <= hub.files[REPO].items()
    assert not goes.keys() & hub.files[REPO].keys()
    assert "adapter_model.safetensors" in hub.files[REPO]


def test_the_card_is_the_hubs_and_tells_the_run(
    runs: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    done = push({}, runs["slora"], REPO, "--dry-run", to)
    assert done.returncode == 0, done.stderr
    card = ModelCard((to / "README.md").read_text())
    found = summary(runs["slora"])
    data = card.data.to_dict()
    assert isinstance(card.data, ModelCardData)
    results = card.data.eval_results or []
    # A folder is no name of the Hub's.
    assert "base_model" not in data
    assert (data["library_name"], data["pipeline_tag"]) == (
        "peft",
        "text-classification",
    )
    assert data["tags"] == ["federated-learning", "slora-flwr", "slora"]
    figures = {r.metric_type: r.metric_value for r in results}
    names = {"accuracy": "accuracy", "f1": "macro_f1", "loss": "loss"}
    assert figures == {kind: round(found[n], 6) for kind, n in names.items()}
    assert {r.dataset_name for r in results} == {f"test texts of {corpus.name}"}
    # Wilson's interval by his formula.
    config = KeptState.read(runs["slora"], "last").config
    n = len(Trainer(config).data.tokenised.test)
    p, z = found["accuracy"], norm.ppf(0.975)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    told = f"{middle - half:.1%} to {middle + half:.1%} (Wilson, {n} texts)"
    assert f"| accuracy, 95% interval | {told} |" in card.text
    assert "[arXiv 2308.06522](https://arxiv.org/abs/2308.06522)" in card.text
    assert f'snapshot_download("{REPO}")' in card.text
    # So short a run is no better than the majority class, as its summary says too.
    assert found["warning"] in card.text
    assert str(corpus.parent) not in card.content


@pytest.mark.parametrize(
    ("repo", "changes", "status", "told"),
    [
        ("headlines", {}, 2, "REPO is 'headlines'; allowed: USER/NAME"),
        ("a/b/c", {}, 2, "REPO is 'a/b/c'; allowed: USER/NAME"),
        (f"{USER}/a--b", {}, 2, f"REPO is '{USER}/a--b'; allowed: USER/NAME"),
        (REPO, {"HF_TOKEN": ""}, 2, "token is missing; allowed: one that may write"),
        (REPO, {"HF_TOKEN": "hf_of_nobody"}, 1, "does not know the token (status 401)"),
        (REPO, {"HF_TOKEN": READ_TOKEN}, 1, "the token may not write there (status"),
        ("another/name", {}, 1, "the token may not write there (status 403)"),
        (REPO, {"HF_ENDPOINT": "closed"}, 1, "Connection refused"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, 1, "offline mode is enabled"),
    ],
)
def test_what_cannot_be_pushed_is_one_clear_line(
    runs: dict[str, Path],
    hub: Hub,
    tmp_path: Path,
    repo: str,
    changes: dict[str, str],
    status: int,
    told: str,
) -> None:
    if changes.get("HF_ENDPOINT") == "closed":
        changes = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    done = push(hub.environment(tmp_path) | changes, runs["lora"], repo)
    assert done.returncode == status, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert told in line
    assert TOKEN not in line
    assert not any(hub.files.values())


def test_a_run_that_has_not_ended_is_not_pushed(
    runs: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in runs["lora"].iterdir():
        if path.name != "summary.json":
            (run / path.name).symlink_to(path)
    done = push(hub.environment(tmp_path), run, REPO)
    assert done.returncode == 2
    assert "is of a run that has not ended" in done.stderr
    assert not hub.files


def test_a_state_that_is_not_finite_is_not_pushed(
    runs: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    which = "averaged"
    path = run / "checkpoints" / f"{which}.safetensors"
    state, about = load_file(path), facts(run, which)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, path, about)
    done = push(hub.environment(tmp_path), run, REPO)
    assert done.returncode == 2
    assert f"the {which} state of {run} has numbers that are not" in done.stderr
    assert not hub.files
