"""Families of decoders: padding, positions, layers of their own kind; both tasks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    CTRLConfig,
    CTRLModel,
)

from slora_flwr.adapters.export import load_adapter
from slora_flwr.backbone.families import expert_weights
from slora_flwr.backbone.load import load_backbone, load_tokenizer
from slora_flwr.common.tensors import State
from slora_flwr.config import ConfigError, ModelConfig, Value, parse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.engines.inline import InlineGrid
from slora_flwr.server.run import run
from slora_flwr.training.trainer import Trainer
from tests.support.causal import (
    FAMILIES,
    LANGUAGE_MODELS,
    MIXTURES,
    WITHOUT_CLASSIFIER,
    make_language_model,
    save_language_model,
    write_dialogues,
)
from tests.support.plain_rounds import PlainRounds
from tests.support.tiny import (
    LABELS,
    VOCAB,
    copy_parameters,
    load_tiny,
    logits,
    make_examples,
    save_checkpoint,
)

DECODERS = ("gpt2", "opt", "llama", "gpt-neox")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family, without dropout."""
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("families")
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0)
    return {name: save_language_model(name, root / name, **off) for name in FAMILIES}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, families: dict[str, Path]) -> Path:
    return families[request.param]


def make_config(folder: Path, corpus: Path, method: str = "slora") -> dict[str, Value]:
    return {
        "model.name": str(folder),
        "data.name": str(corpus),
        "data.max-length": 16,
        "clients.count": 4,
        "clients.per-round": 4,
        "clients.partitioner": "iid",
        "lora.rank": 4,
        "rounds": 2,
        "run.eval-every": 0,
        "sparse.rounds": 1,
        "sparse.density": 0.05,
        "method": method,
    }


def test_padding_does_not_reach_a_decoders_logits(decoder: Path) -> None:
    backbone = load_tiny(decoder)
    examples = make_examples()
    together = logits(backbone.model, examples)
    for row in range(len(examples)):
        alone = logits(backbone.model, examples.select(np.array([row])))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(
    tmp_path: Path,
) -> None:
    save_language_model("gpt2", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(ModelConfig(name=str(tmp_path)), LABELS, 0)
    assert backbone.model.config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_longer_texts_than_positions_are_refused(
    family: str, families: dict[str, Path], corpus: Path
) -> None:
    given = make_config(families[family], corpus) | {"data.max-length": 41}
    with pytest.raises(ConfigError, match="is 41; allowed: 4 to 40, the positions"):
        Trainer(parse(given)).model.backbone  # noqa: B018
    Trainer(parse(given | {"data.max-length": 40})).model.backbone  # noqa: B018


def test_tables_of_positions_of_any_name_are_found_by_reading(
    corpus: Path, tmp_path: Path
) -> None:
    """CTRL's table is a plain tensor; reading a text that is too long shows it."""
    body = CTRLModel(
        CTRLConfig(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=1, n_head=2, dff=48
        )
    )
    given = make_config(save_checkpoint(body, tmp_path), corpus)
    with pytest.raises(ConfigError, match="is 20; allowed: the length of texts that"):
        Trainer(parse(given | {"data.max-length": 20})).model.backbone  # noqa: B018
    Trainer(parse(given | {"data.max-length": 16})).model.backbone  # noqa: B018


def test_texts_of_all_positions_can_be_read(decoder: Path) -> None:
    backbone = load_tiny(decoder)
    ids = torch.randint(5, VOCAB, (2, 40))
    out = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("method", ["slora", "fedex-lora", "sft", "fft"])
def test_an_export_loads_in_stock_libraries(
    method: str, decoder: Path, corpus: Path, tmp_path: Path
) -> None:
    """The file formats are the checkpoint's: GPT-2's weights are transposed there."""
    given = make_config(decoder, corpus, method)
    given |= {"run.dir": str(tmp_path / "run"), "rounds": 3}
    summary = run(InlineGrid(given), given, 1)
    found = tmp_path / "run"
    if (found / "model").exists():
        model = AutoModelForSequenceClassification.from_pretrained(found / "model")
    else:
        adapter = found / "adapter"
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            decoder, num_labels=LABELS
        )
        model.config.pad_token_id = 0
        model = load_adapter(model, adapter)
    test = Trainer(parse(given)).data.tokenised.test
    loss = F.cross_entropy(logits(model, test), torch.from_numpy(test.labels))
    assert float(loss) == pytest.approx(summary["loss"], abs=1e-4)


# --- every family, for both tasks


METHODS = (
    "fft",
    "bitfit",
    "head",
    "sft",
    "slora",
    "lora",
    "ffa-lora",
    "alternate-lora",
    "fedex-lora",
    "flexlora",
    "head-lora",
)


def cases() -> list[tuple[str, str, str, bool]]:
    """Every method on three families, and one with both phases on all others.

    As classifiers, whose blocks are the same, each method is on one of the three.
    Mixtures train their experts too with `fft`. The last is whether steps are in parts.
    """
    return [
        (family, task, method, in_parts)
        for family in FAMILIES
        for task in ("classification", "causal-lm")
        for method in (METHODS if family in LANGUAGE_MODELS else ("fft", "slora"))
        if task == "causal-lm" or family not in WITHOUT_CLASSIFIER
        if task == "causal-lm"
        or method in ("fft", "slora", "bitfit")
        or family == LANGUAGE_MODELS[METHODS.index(method) % len(LANGUAGE_MODELS)]
        if task == "classification" or method not in ("head", "head-lora")
        if method != "bitfit" or family == "gpt2"  # the others have no biases
        if method != "fft" or family in (*LANGUAGE_MODELS, *MIXTURES)
        for in_parts in (False, True)
        if not in_parts or (family in LANGUAGE_MODELS and method == "slora")
    ]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.csv")


@pytest.mark.parametrize(("family", "task", "method", "in_parts"), cases())
def test_rounds_equal_those_of_plain_pytorch(
    family: str,
    task: str,
    method: str,
    in_parts: bool,
    families: dict[str, Path],
    corpus: Path,
    dialogues: Path,
    tmp_path: Path,
) -> None:
    """One round of each phase; the resident weights are W_0's bits again after each."""
    given = make_config(families[family], corpus, method) | {
        "download.base-dtype": "float32",  # which would round the start
        "clients.count": 3,
        "clients.per-round": 3,
        "run.dir": str(tmp_path / "run"),
        "lora.targets": MIXTURES.get(family, "all-linear"),
        "server.average": "none",
        "train.batch-size": 200,
        "train.epochs": 2,
        "train.lr": 0.2,
        "train.optimizer": "sgd",
    }
    if task == "causal-lm":
        given |= {
            "task": task,
            "data.name": str(dialogues),
            "data.text": "prompt,input",
            "data.response": "response",
            "clients.by": "category",
            "clients.partitioner": "natural",
        }
    if in_parts:
        given |= {
            "train.accumulate": 3,
            "train.tokens": 60,
            "train.checkpointing": True,
        }
    config = parse(given)
    if len(make_schedule(config)) == 1:
        config = parse(given := given | {"rounds": 1})
    trainer = Trainer(config)
    before = copy_parameters(trainer.model.backbone.model)
    start: State = {}
    for phase in trainer.schedule:
        adapter = trainer.model.attach(phase)
        adapter.begin(1)
        state = adapter.state()
        start |= adapter.whole(state)
        trainer.train_client(0, state, phase, 1)
        trainer.model.detach()
        after = dict(trainer.model.backbone.model.named_parameters())
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
    plain = PlainRounds(config, trainer, start)
    expected = plain.run()
    assert abs(expected - plain.first) > 1e-3
    assert run(InlineGrid(given), given, 1)["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "sft", "slora", "fedex-lora"])
@pytest.mark.parametrize("family", MIXTURES)
def test_skipped_experts_are_named(
    family: str, method: str, families: dict[str, Path], dialogues: Path
) -> None:
    given = make_config(families[family], dialogues, method)
    given |= {"task": "causal-lm", "data.text": "prompt", "data.response": "response"}
    given |= {"clients.by": "category"}
    with pytest.raises(ConfigError, match=r"the experts of model .*_(proj|linear)"):
        Trainer(parse(given)).model.backbone  # noqa: B018
    Trainer(parse(given | {"lora.targets": MIXTURES[family]})).model.backbone  # noqa: B018


def test_experts_below_one_another_are_found() -> None:
    """As DBRX has them: all experts' rows in a matrix."""
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.w1 = nn.Parameter(torch.zeros(8, 4))
    model.experts.bias = nn.Parameter(torch.zeros(8))
    model.mixer = nn.Conv1d(4, 4, 2)
    assert expert_weights(model) == {"experts.w1": (8, 4)}


def test_logits_that_are_made_otherwise_are_refused(
    dialogues: Path, tmp_path: Path
) -> None:
    """BERT transforms the hidden states before its output layer."""
    body = BertLMHeadModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=40,
            is_decoder=True,
        )
    )
    given = make_config(save_checkpoint(body, tmp_path), dialogues)
    given |= {"task": "causal-lm", "data.text": "prompt", "data.response": "response"}
    with pytest.raises(ConfigError, match=r"model.name is .* BertLMHeadModel makes"):
        Trainer(parse(given | {"clients.by": "category"})).model.backbone  # noqa: B018


def test_tokenizers_that_read_nothing_are_refused(tmp_path: Path) -> None:
    """transformers makes byte pairs of any vocabulary of Qwen2's."""
    save_checkpoint(make_language_model("qwen2"), tmp_path)
    with pytest.raises(ConfigError, match="makes no tokens of text"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
