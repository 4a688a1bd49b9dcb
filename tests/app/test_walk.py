"""docs/guides/five-minutes.md as it is written: the same figures at each end."""

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from slora_flwr import train
from slora_flwr.config import parse
from slora_flwr.data.data_sets import load_texts
from slora_flwr.runs.checkpoint_files import checkpoint_path, list_checkpoints
from slora_flwr.runs.reader import read_run
from tests.support.processes import wait_until
from tests.support.resuming import assert_same
from tests.support.runs import events, summary
from tests.support.stock import read_code
from tests.support.tiny import SPECIAL

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "five-minutes.md").read_text()
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
KINDS = {
    "account": "password login email profile locked name reset",
    "billing": "charged card invoice refund twice price paid",
    "delivery": "parcel late courier address arrived lost open",
    "returns": "broken send back exchange size label wrong",
}
OTHER = "my the was i it please order a for is not and on yesterday again"
# The last round before the run is killed, in the low-rank phase.
KILLED_AFTER = 6
# A run that stays in this round until it is killed.
WAITING = f"""
import pathlib, signal
replace = pathlib.Path.replace

def replace_and_wait(path, target):
    replaced = replace(path, target)
    if pathlib.Path(target).name == "round-{KILLED_AFTER:04}.safetensors":
        signal.pause()
    return replaced

pathlib.Path.replace = replace_and_wait
"""
# Batches of other sizes, and products that are merged, change the last bits of a mean
# loss in float32. An accuracy would differ by a whole text, at least 1 / 100.
WITHIN = 1e-5
WITHOUT = """
import sys
for name in ("slora_flwr", "slora_embedded"):
    sys.modules[name] = None
"""
# Texts in batches, as their reader would make them, and not the run's own.
MEASURE = """
import csv, json, torch
rows = [*csv.DictReader(open(FILE, newline="", encoding="utf-8"))]
labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
logits = []
for at in range(0, len(rows), 32):
    texts = [row["text"] for row in rows[at : at + 32]]
    given = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits.append(model.eval()(**given).logits)
logits = torch.cat(logits)
loss = torch.nn.functional.cross_entropy(logits, labels)
right = (logits.argmax(-1) == labels).sum()
print("FOUND " + json.dumps([float(loss), int(right) / len(rows)]))
"""


@dataclass
class Walk:
    """A folder in which one works through the guide."""

    folder: Path
    model: Path
    home: Path

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        return os.environ | {
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "SLORA_HOME": str(self.home),
        }

    def blocks(self, kind: str) -> list[str]:
        """Return the guide's blocks of a language."""
        found = re.findall(rf"^```{kind}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
        return [block.replace(HUB_MODEL, str(self.model)) for block in found]

    def type(self, line: str) -> str:
        """Return what a line of the shell prints."""
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, line: str) -> Path:
        """Kill a run once it has written a round's checkpoint; return its directory."""
        hook = self.folder / "hook" / "sitecustomize.py"
        hook.parent.mkdir()
        hook.write_text(WAITING)
        path = os.pathsep.join((str(hook.parent), self.env["PYTHONPATH"]))
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-euc", line],
                cwd=self.folder,
                env=self.env | {"PYTHONPATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        written = f"runs/*/checkpoints/round-{KILLED_AFTER:04}.safetensors"
        try:
            wait_until(
                lambda: any(self.home.glob(written)) or process.poll() is not None
            )
            assert process.poll() is None, (self.folder / "log").read_text()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        [directory] = (self.home / "runs").iterdir()
        return directory

    def measure(self, code: str, folder: str) -> list[float]:
        """Return loss and accuracy of what code loads with stock libraries."""
        file = self.folder / "new.csv"
        code = "\n".join((code, MEASURE.replace("FILE", repr(str(file)))))
        return [float(value) for value in self.find(code, folder)]

    def find(self, code: str, folder: str) -> Any:
        """Return what code with stock libraries says that it has found."""
        code = f"{WITHOUT}\n{code}"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=self.folder / folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        [line] = re.findall(r"^FOUND (.*)$", done.stdout, re.MULTILINE)
        return json.loads(line)


def write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def draw_texts(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield texts in which most words that tell a label tell the right one.

    Some are longer than what is read of them.
    """
    draw = random.Random(seed)
    for _ in range(count):
        label, wrong = draw.sample([*KINDS], 2)
        words = draw.choices(OTHER.split(), k=draw.choice([*range(2, 12), 90]))
        words += draw.choices(KINDS[label].split(), k=draw.randint(1, 4))
        words += draw.choices(KINDS[wrong].split(), k=draw.randint(0, 2))
        draw.shuffle(words)
        yield f"{' '.join(words).capitalize()}.", label


def make_model(folder: Path) -> Path:
    """Save a pretrained BERT without a head, with a tokenizer like MiniLM's."""
    words = sorted({*OTHER.split(), *" ".join(KINDS.values()).split()})
    pieces = [*SPECIAL, ".", *(f"##{letter}" for letter in ascii_lowercase), *words]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    pad, unk, cls, sep, mask = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": len(KINDS),
    }
    model = BertForSequenceClassification(BertConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pretraining, names = [*draw_texts(4, 100 * 32)], [*KINDS]
    for at in range(0, len(pretraining), 32):
        batch = pretraining[at : at + 32]
        given = fast(
            [text for text, _ in batch],
            truncation=True,
            max_length=64,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.tensor([names.index(label) for _, label in batch])
        optimizer.zero_grad()
        model(**given, labels=labels).loss.backward()
        optimizer.step()
    model.bert.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny", "minilm-l6-h384-uncased"])
def walk(request: pytest.FixtureRequest, tmp_path: Path) -> Walk:
    folder = tmp_path / "work"
    folder.mkdir()
    write_table(folder / "texts.csv", draw_texts(3, 500))
    if request.param == "tiny":
        model = make_model(tmp_path / "tiny")
    else:
        assets: Path = request.getfixturevalue("assets")
        model = assets / "models" / request.param
    return Walk(folder, model, tmp_path / "home")


def test_the_guide_is_walked_to_its_end(walk: Walk, tmp_path: Path) -> None:
    write, plan, run, resume, report, predict, export = walk.blocks("bash")
    walk.type(write)
    assert walk.type(plan).startswith("slora: 12 rounds")

    directory = walk.kill(run)
    newest = list_checkpoints(directory)[-1]
    assert newest == checkpoint_path(directory, KILLED_AFTER)
    assert read_run(directory).state == "interrupted"
    walk.type(resume)
    assert [event["round"] for event in events(directory, "resumed")] == [KILLED_AFTER]
    page = Path(walk.type(report).strip())
    assert page == directory / "report.html"

    config = {"run.dir": tmp_path / "unbroken"}
    assert_same(directory, train(walk.folder / "own.toml", config).directory)

    told = summary(directory)
    assert f"{told['accuracy']:.1%}" in page.read_text()
    expected = pytest.approx([told["loss"], told["accuracy"]], rel=0, abs=WITHIN)
    _, test = load_texts(parse(read_run(directory).config).data)
    write_table(walk.folder / "new.csv", zip(test.texts, test.labels, strict=True))
    walk.type(predict)
    lines = (walk.folder / "labels.jsonl").read_text().splitlines()
    assert figures([json.loads(line) for line in lines], test.labels) == expected

    walk.type(export)
    [load] = walk.blocks("python")
    named = "model, tokenizer = classify.model, classify.tokenizer"
    assert walk.measure(f"{load}\n{named}", ".") == expected
    here = max(map(json.loads, lines), key=lambda one: len(one["text"]))
    asked = f"import json\nprint('FOUND', json.dumps(classify({here['text']!r})))"
    [there] = walk.find(f"{load}\n{asked}", ".")
    assert there["label"] == here["label"]
    assert there["score"] == pytest.approx(here["probability"], rel=0, abs=WITHIN)
    adapter = walk.folder / "my-adapter"
    (adapter / walk.model.name).symlink_to(walk.model)
    code = read_code((adapter / "README.md").read_text())
    assert walk.measure(code, adapter.name) == expected


def figures(found: list[dict[str, Any]], labels: list[str]) -> list[float]:
    """Return the loss and the accuracy of predictions."""
    pairs = [*zip(found, labels, strict=True)]
    return [
        fmean(-math.log(one["probabilities"][label]) for one, label in pairs),
        fmean(one["label"] == label for one, label in pairs),
    ]
