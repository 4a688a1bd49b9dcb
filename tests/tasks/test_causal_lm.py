"""Loss, metrics and answers of language models, against transformers' own."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from slora_flwr.adapters import LowRankAdapter, SparseAdapter
from slora_flwr.backbone.load import Backbone, load_backbone
from slora_flwr.common.random import key
from slora_flwr.config import DataConfig, ModelConfig, RecipeConfig
from slora_flwr.data.data_sets import load_texts
from slora_flwr.data.dialogues import content_of
from slora_flwr.data.examples import Batch, Examples
from slora_flwr.data.texts import Texts, prompts_of
from slora_flwr.data.tokens import tokenise
from slora_flwr.tasks import causal_lm
from slora_flwr.tasks.base import pool
from slora_flwr.tasks.causal_lm import CausalLM, TokenEvaluation
from slora_flwr.training.loop import evaluate, train
from tests.support.causal import (
    LANGUAGE_MODELS,
    save_language_model,
    write_dialogues,
)
from tests.support.tiny import copy_parameters


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("language-models")
    return {f: save_language_model(f, root / f) for f in LANGUAGE_MODELS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    path = write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.csv")
    config = DataConfig(name=str(path), text="prompt,input", response="response")
    return load_texts(config, dialogues=True)[0]


def load(folder: Path) -> Backbone:
    return load_backbone(ModelConfig(name=str(folder)), None, 0, task=CausalLM())


def make_examples(backbone: Backbone, texts: Texts) -> Examples:
    encoder = CausalLM().encoder(DataConfig(max_length=16), backbone.tokenizer)
    return tokenise(encoder, [], texts)


def reference(folder: Path, examples: Examples) -> tuple[float, int, int]:
    """Return summed loss, right tokens and tokens, a text at a time, unpadded."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, hits, tokens = 0.0, 0, 0
    assert examples.learned is not None
    for start, end in zip(examples.offsets, examples.offsets[1:], strict=False):
        ids = torch.tensor(examples.tokens[start:end].tolist())
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for at in range(1, len(ids)):
            if examples.learned[start + at]:
                log_probabilities = logits[at - 1].log_softmax(-1)
                total -= float(log_probabilities[ids[at]])
                hits += int(log_probabilities.argmax() == ids[at])
                tokens += 1
    return total, hits, tokens


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
@pytest.mark.parametrize("most", [2**24, 5 * 120])
def test_loss_and_metrics_are_those_of_single_unpadded_texts(
    folders: dict[str, Path],
    texts: Texts,
    family: str,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the logits are made in chunks of five positions."""
    monkeypatch.setattr(causal_lm, "_MOST_LOGITS", most)
    backbone = load(folders[family])
    assert not backbone.head
    examples = make_examples(backbone, texts)
    total, hits, tokens = reference(folders[family], examples)
    found = evaluate(backbone, examples, batch_size=7)
    assert isinstance(found, TokenEvaluation)
    assert found.counts.tolist() == [hits, tokens, len(examples)]
    assert found.loss == pytest.approx(total / tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(total / tokens), rel=1e-5)
    assert int(examples.units.sum()) == tokens

    task, model = CausalLM(), backbone.model.eval()  # without dropout
    weight = model.get_output_embeddings().weight.requires_grad_(True)
    batch = examples.batch(np.arange(9))
    loss = task.loss(model, batch)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1]
    whole = F.cross_entropy(
        logits.transpose(1, 2), batch.labels[:, 1:], reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    [ours] = torch.autograd.grad(loss, weight)
    [theirs] = torch.autograd.grad(whole, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 0])
def test_loss_of_training_is_that_of_the_tokens_read(
    folders: dict[str, Path], texts: Texts, steps: int
) -> None:
    """Steps differ in their numbers of tokens: batches are of similar length."""
    backbone = load(folders["llama"])
    examples = make_examples(backbone, texts)
    stream = np.random.Philox(key=key("train", 0, 1, 2))
    stream.random_raw()  # of dropout
    read = np.concatenate([*islice(examples.shuffled(6, stream), steps or None)])
    total, _, tokens = reference(folders["llama"], examples.select(read))
    adapter = LowRankAdapter(4, 8.0)
    adapter.attach(backbone)
    recipe = RecipeConfig(batch_size=6, steps=steps, optimizer="sgd", lr=1e-12)
    found = train(backbone, adapter, examples, recipe, (0, 1, 2))
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_evaluations_pool_by_tokens() -> None:
    one = TokenEvaluation(1.0, np.array([3, 10, 2]))
    other = TokenEvaluation(4.0, np.array([5, 30, 1]))
    both = pool([one, other])
    assert both.loss == pytest.approx((10 * 1 + 30 * 4) / 40)
    assert both.accuracy == 8 / 40
    assert both.examples == 3
    assert both.perplexity == pytest.approx(np.exp(130 / 40))
    assert TokenEvaluation(1e4, np.array([0, 1, 1])).perplexity == float("inf")


@pytest.mark.parametrize(
    ("counts", "loss"),
    [([3, 2, 1], 1.0), ([-1, 2, 1], 1.0), ([0, 1, 2], 1.0), ([0, 1, 0], 1.0)],
)
def test_counts_that_cannot_be_are_refused(counts: list[int], loss: float) -> None:
    given = dict(zip(TokenEvaluation.names, counts, strict=True))
    with pytest.raises(ValueError, match="TokenEvaluation"):
        CausalLM().read(loss, given, 0)
    with pytest.raises(ValueError, match="TokenEvaluation"):
        CausalLM().read(loss, {name: [1, 2] for name in given}, 0)


def test_samples_are_answers_to_prompts_from_all_over_the_data(
    folders: dict[str, Path], texts: Texts
) -> None:
    backbone, task = load(folders["llama"]), CausalLM()
    examples = make_examples(backbone, texts)
    encoder = task.encoder(DataConfig(max_length=16), backbone.tokenizer)
    samples = task.sample(backbone.model.eval(), encoder, examples)
    count = len(examples)
    rows = [count // 6, count // 2, 5 * count // 6]
    dialogues = [texts.dialogues[row] for row in rows]
    prompts = [content_of(dialogue[0]) for dialogue in dialogues]
    answers = list(task.answer(backbone.model, encoder, [], prompts_of(prompts)))
    for sample, dialogue, answer in zip(samples, dialogues, answers, strict=True):
        assert sample.prompt.split() == content_of(dialogue[0]).split()
        assert sample.right == dialogue[-1]["content"]
        assert answer.response.startswith(sample.said)

    # A text that is learned itself has no prompt.
    whole = replace(texts, dialogues=[[d[-1]] for d in texts.dialogues])
    assert not task.sample(backbone.model, encoder, make_examples(backbone, whole))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_answers_are_transformers_own_greedy_ones(
    folders: dict[str, Path], family: str
) -> None:
    backbone, task = load(folders[family]), CausalLM()
    encoder = task.encoder(DataConfig(max_length=16), backbone.tokenizer)
    prompts = ["w5 w6", "w7 w8 w9", "w10 w11", "w12"]
    answers = list(task.answer(backbone.model.eval(), encoder, [], prompts_of(prompts)))
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = backbone.tokenizer(prompt, return_tensors="pt")["input_ids"]
        given: list[int] = []
        while len(given) < causal_lm.MOST_TOKENS:
            with torch.no_grad():
                whole = torch.cat([ids, torch.tensor([given], dtype=torch.int64)], 1)
                token = int(model(input_ids=whole).logits[0, -1].argmax())
            if token == 3 or whole.shape[1] > 30:
                break
            given.append(token)
        expected = backbone.tokenizer.decode(given, skip_special_tokens=True)
        assert answer.response.startswith(expected)
        assert answer.facts == {"prompt": prompt, "response": answer.response}


class Largest(TorchDispatchMode):
    """The most entries of a tensor that is made within the context."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 4)
        return out


def test_logits_of_a_large_vocabulary_are_never_held_whole(tmp_path: Path) -> None:
    """Gemma's 262,144 entries: 256 positions would be 256 MB of logits."""
    sizes = {"vocab_size": 2**18, "max_position_embeddings": 64}
    save_language_model("gemma", tmp_path, **sizes)
    backbone, task = load(tmp_path), CausalLM()
    adapter = LowRankAdapter(4, 8.0)
    adapter.attach(backbone)
    ids = torch.randint(5, 2**18, (4, 64))
    batch = Batch(ids, torch.ones_like(ids), ids)
    with Largest() as mode:
        task.loss(backbone.model.train(), batch).backward()
    assert mode.entries <= 2**24 < 4 * 63 * 2**18
    with Largest() as mode, torch.inference_mode():
        found = task.evaluate(backbone.model.eval(), [batch])
        task.run(backbone.model, ids, torch.ones_like(ids))
    assert found.units == 4 * 63
    assert mode.entries <= 2**24


def test_resident_weights_in_bf16_train_values_in_float32(
    folders: dict[str, Path], texts: Texts
) -> None:
    config = ModelConfig(name=str(folders["gemma"]), dtype="bfloat16")
    backbone = load_backbone(config, None, 0, task=CausalLM())
    examples = make_examples(backbone, texts)
    before = copy_parameters(backbone.model)
    recipe = RecipeConfig(lr=0.02, epochs=4)
    for adapter in (LowRankAdapter(4, 8.0), SparseAdapter(0.1, "unstructured", 5)):
        first = evaluate(backbone, examples, "bf16").loss
        adapter.attach(backbone)
        train(backbone, adapter, examples, recipe, (0, 1, 2))
        assert evaluate(backbone, examples, "bf16").loss < 0.9 * first
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        # Not rounded to bf16 between steps.
        values = torch.cat([t.reshape(-1) for t in adapter.state().values()])
        assert (values.bfloat16().float() != values).float().mean() > 0.5
        adapter.detach()
        for name, parameter in backbone.model.named_parameters():
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(parameter, before[name])
