"""What a model cannot do is refused before any client is asked."""

from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from slora_flwr.common.files import cache_folder
from slora_flwr.config import ConfigError, Value, methods, parse
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.texts import list_classes
from slora_flwr.data.tokens import tokenise
from slora_flwr.tasks.classification import Classification
from slora_flwr.training.trainer import Trainer
from tests.support.tiny import VOCAB, make_tokenizer, save_checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [f"w{i} w{i + 1},{'odd' if i % 2 else 'even'}" for i in range(40)]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("family", "most"), [("bert", 40), ("roberta", 39), ("albert", 40)]
)
def test_texts_longer_than_the_models_positions_are_refused(
    data: Path, tiny_models: dict[str, Path], family: str, most: int
) -> None:
    values = {"model.name": str(tiny_models[family]), "data.name": str(data)}
    refusal = f"data.max-length is {most + 1}; allowed: 4 to {most}, the positions"
    with pytest.raises(ConfigError, match=refusal):
        _ = Trainer(parse({**values, "data.max-length": most + 1})).model.backbone
    trainer = Trainer(parse({**values, "data.max-length": most}))
    trainer.model.attach(trainer.schedule[0])


@pytest.mark.parametrize("method", ["sft", "lora", "slora"])
def test_a_model_without_linear_layers_is_refused(
    data: Path, tmp_path: Path, method: str
) -> None:
    body = BertModel(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=0,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    folder = save_checkpoint(body, tmp_path / "no-blocks")
    values = {"model.name": str(folder), "data.name": str(data), "method": method}
    with pytest.raises(ConfigError, match=f"no linear layers; allowed for {method}"):
        _ = Trainer(parse(values)).model.backbone


def test_a_rank_beyond_the_matrices_is_refused(
    data: Path, tiny_models: dict[str, Path]
) -> None:
    values = {"model.name": str(tiny_models["bert"]), "data.name": str(data)}
    config = parse({**values, "lora.rank": 33, "data.max-length": 8})
    with pytest.raises(ConfigError, match=r"lora\.rank is 33; allowed: 1 to 32"):
        _ = Trainer(config).model.backbone


def test_real_tokenizers_find_their_tokens_in_the_cache(data: Path) -> None:
    config = parse({"data.name": str(data)})
    texts = load_texts(config.data)
    cached = []
    for _ in range(2):  # as two processes would, each with a fresh tokenizer
        encoder = Classification().encoder(config.data, make_tokenizer())
        tokenise(encoder, list_classes(texts), texts[0])
        cached.append({path.name for path in cache_folder().glob("tokens-*")})
    assert cached[0] == cached[1]


def test_each_phase_trains_the_factors_of_its_own_aggregator(
    data: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (methods.PhaseRow("lora", "ffa"), methods.PhaseRow("bias", "fedavg"))
    two = methods.Method(rows, "a frozen A, then biases")
    monkeypatch.setitem(methods.METHODS, "two", two)
    values = {"model.name": str(tiny_models["bert"]), "data.name": str(data)}
    small: dict[str, Value] = {
        "method": "two",
        "rounds": 2,
        "sparse.rounds": 1,
        "data.max-length": 8,
    }
    trainer = Trainer(parse(values | small))
    state = trainer.model.attach(trainer.schedule[0]).state()
    assert any(name.endswith(".lora_B") for name in state)
    assert not any(name.endswith(".lora_A") for name in state)
