"""Pretrain the embedded language model on the text of Python's standard library.

    python -m tools.pretrain_llama --out DIR

The files in `slora_embedded/llama` were made with Python 3.11.7's library (1.19 million
tokens of prose, 1.98 million of code) and the defaults below. That took 455 seconds of
one core's time on a shared two-core virtual machine, 76 of them for the text, the
tokenizer and the word vectors. Final loss on prose that was held out: 4.636 a token
(chance: 8.32).

The text is the prose that the embedded classifier learned from (docstrings, comments
and the pages of the language reference), and code. No passage of it begins with a
sentence that `stdlib-summaries` asks for, of its training or of its test data. A few
stand elsewhere in it: of the 1,428 test responses 9 in the prose and 2 in the code.
"""

import argparse
import ast
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slora_embedded.pretrain import read_documents, word_vectors
from slora_flwr.data import stdlib_summaries
from slora_flwr.data.stdlib_docs import modules

END, PAD = "<|end|>", "<|pad|>"
LENGTH, POSITIONS = 256, 512


def read_prose() -> list[str]:
    """Return the prose without the sentences of `stdlib-summaries`."""
    asked = {*stdlib_summaries.load()["response"]}
    passages = (passage for document in read_documents() for passage in document)
    return [left for p in passages if (left := without(p, asked))]


def without(passage: str, asked: set[str]) -> str:
    """Return a passage that does not begin with any of some sentences."""
    sentence = stdlib_summaries.first_sentence(passage)
    if sentence not in asked:
        return passage
    first, _, others = passage.strip().partition("\n\n")
    left = first.split()[len(sentence.split()) :]
    return "\n\n".join(filter(None, (" ".join(left), others)))


def read_code() -> Iterator[str]:
    """Yield the library's documented modules without docstrings and comments."""
    for path, _ in modules(Path(sysconfig.get_path("stdlib"))):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and _is_text(body[0]):
                body[0] = ast.Pass()
        yield ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        eos_token=END,
        pad_token=PAD,
    )


def windows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> NDArray[np.int64]:
    """Return texts, one after another, cut into windows; shape (windows, LENGTH)."""
    end = tokenizer.eos_token_id
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.array([*row, end], dtype=np.int64) for row in ids])
    return stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)


def batches(
    sources: Sequence[NDArray[np.int64]], rows: int, rng: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Yield batches with as many windows of each source, each source in random order.

    A source that is used up begins anew.
    """

    def draw(source: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        while True:
            yield from source[rng.permutation(len(source))]

    streams = [draw(source) for source in sources]
    while True:
        drawn = [next(stream) for stream in streams for _ in range(rows)]
        yield torch.from_numpy(np.stack(drawn))


def pretrain(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    held_out: torch.Tensor,
    steps: int,
    lr: float,
    out: Path,
) -> None:
    """Train a model, and save it now and then."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    for step in range(1, steps + 1):
        loss = _loss(model, next(data))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                held = _loss(model, held_out).item()
            told = f"{step} {np.mean(losses[-50:]):.3f}, prose held out {held:.3f}"
            print(f"{told}, {time.process_time():.0f} s", flush=True)
        if step % 200 == 0:
            model.save_pretrained(out / "checkpoint")


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def main() -> None:
    """Train tokenizer and model, and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rows", type=int, default=2, help="of each source, a batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    prose, code = read_prose(), list(read_code())
    tokenizer = train_tokenizer([*prose, *code], args.vocabulary)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    sources = [windows(texts, tokenizer) for texts in (prose, code)]
    told = ", ".join(str(source.size) for source in sources)
    print(f"tokens of prose and code: {told}", flush=True)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    sources[0] = rng.permutation(sources[0])
    held_out, sources[0] = torch.from_numpy(sources[0][:16]), sources[0][16:]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    ids = [[row.tolist() for source in sources for row in source]]
    vectors = word_vectors(ids, len(tokenizer), model.config.hidden_size)
    # Half as long as an encoder's, since they give the logits too.
    model.get_input_embeddings().weight.data = vectors / 2
    print(f"{model.num_parameters()} weights, {time.process_time():.0f} s", flush=True)
    data = batches(sources, args.rows, rng)
    pretrain(model, data, held_out, args.steps, args.lr, args.out)
    model.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
