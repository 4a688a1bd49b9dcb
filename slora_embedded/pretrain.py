"""Pretrain the embedded model on the text of Python's standard library.

    python -m slora_embedded.pretrain --out DIR

The files in this folder were made with Python 3.11.7's library (1.05 million tokens)
and the defaults below. That took about 8 minutes, 7 of them training, on one core of a
shared two-core AMD EPYC virtual machine. Final losses: masked tokens 5.93, pairs 2.96
(chance: 9.01 and 4.16). The training text includes the docstrings of the data set
`stdlib-docs`, also those of its test split, without their labels.

Runs are reproducible except for the tokenizer: the WordPiece trainer breaks ties in
hash order, so a few entries of the vocabulary, and the order of hundreds, differ.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from slora_flwr.data.stdlib_docs import docstrings

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)

# Every eighth batch has long sequences, with as many tokens in total, so that positions
# beyond the short length are trained too.
SHORT, LONG, LONG_EVERY = 64, 256, 8
# A passage's partner is one of this many on either side of it in the same file.
NEIGHBOURS = 8
# Number of tokens on either side that count as co-occurring.
WINDOW = 8
# BERT's 0.02 suits its width; at width 128 it lets little of the text reach [CLS].
INITIAL = 0.08
MASKED = 0.15
TEMPERATURE = 0.1


def read_documents() -> list[list[str]]:
    """Return the passages of each file: docstrings and blocks of comments.

    They include the test suite, and the pages of the language reference, which
    `pydoc_data` holds as string literals. Each page is a separate document.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[list[str]] = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.relative_to(root).parts:
            documents.append([*docstrings(path), *_comments(path)])
    pages = ast.walk(ast.parse((root / "pydoc_data" / "topics.py").read_bytes()))
    for node in pages:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            documents.append(node.value.split("\n\n"))
    documents = [list(dict.fromkeys(filter(_is_prose, d))) for d in documents]
    return [d for d in documents if d]


def _comments(path: Path) -> Iterator[str]:
    """Yield the runs of comment lines in one file."""
    block: list[str] = []
    for line in [*path.read_text("utf-8", errors="replace").splitlines(), ""]:
        if line.lstrip().startswith("#"):
            block.append(line.strip("#! \t"))
        elif block:
            yield " ".join(block)
            block = []


def _is_prose(text: str) -> bool:
    """Return whether a text is prose, not a table, a ruler or commented-out code."""
    words = text.split()
    return len(words) >= 4 and sum(w.isalpha() for w in words) * 2 >= len(words)


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer of `size` entries."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Rare letters of other scripts would take up a tenth of so small a vocabulary.
    tokenizer.train_from_iterator(
        texts,
        WordPieceTrainer(
            vocab_size=size,
            special_tokens=SPECIAL,
            limit_alphabet=200,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONG,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


class Pairs:
    """Draws pairs of neighbouring passages of one file.

    Parameters
    ----------
    documents : list of list of list of int
        Token ids, without special tokens, of each passage of each file.
    rng : random.Random
        Source of all draws.
    """

    def __init__(self, documents: list[list[list[int]]], rng: random.Random) -> None:
        self.documents = documents
        self.rng = rng
        self.places = [
            (d, p) for d, doc in enumerate(documents) for p in range(len(doc))
        ]

    def draw(self, count: int, length: int) -> tuple[list[list[int]], list[int]]:
        """Return `2 * count` sequences, partners `count` apart, and their files."""
        places = self.rng.choices(self.places, k=count)
        left, right = zip(
            *(self._pair(d, p, length - 2) for d, p in places), strict=True
        )
        sequences = [[CLS, *tokens, SEP] for tokens in left + right]
        return sequences, [d for d, _ in places]

    def _pair(self, d: int, p: int, room: int) -> tuple[list[int], list[int]]:
        passages = self.documents[d]
        low, high = max(0, p - NEIGHBOURS), min(len(passages), p + NEIGHBOURS + 1)
        others = [q for q in range(low, high) if q != p]
        if not others:
            half = len(passages[p]) // 2
            return passages[p][:half][:room], passages[p][half:][:room]
        return self._crop(d, p, room), self._crop(d, self.rng.choice(others), room)

    def _crop(self, d: int, p: int, room: int) -> list[int]:
        """Return a passage cropped to the room.

        If the room is long, a short passage is continued with the next ones.
        """
        tokens = list(self.documents[d][p])
        if room > SHORT:
            for more in self.documents[d][p + 1 :]:
                if len(tokens) >= room:
                    break
                tokens += more
        spare = len(tokens) - room
        # Fine-tuning sees beginnings, so half of the crops are beginnings.
        inside = spare > 0 and self.rng.random() < 0.5
        start = self.rng.randint(0, spare) if inside else 0
        return tokens[start : start + room]


def word_vectors(documents: list[list[list[int]]], vocabulary: int, dim: int) -> Tensor:
    """Return initial embeddings: the SVD of the PPMI of co-occurrence.

    Factorising positive pointwise mutual information takes seconds and yields vectors
    like those of minutes of skip-gram training (Levy and Goldberg 2014).
    """
    rows, columns, weights = [], [], []
    for passage in (torch.tensor(p) for d in documents for p in d):
        for distance in range(1, min(WINDOW + 1, len(passage))):
            rows += [passage[:-distance], passage[distance:]]
            columns += [passage[distance:], passage[:-distance]]
            weights.append(torch.full((2 * len(rows[-1]),), 1 / distance))
    size = (vocabulary, vocabulary)
    where = torch.stack([torch.cat(rows), torch.cat(columns)])
    counts = torch.sparse_coo_tensor(
        where, torch.cat(weights), size, check_invariants=True
    ).coalesce()
    row, column = counts.indices()
    total = counts.sum(0).to_dense()
    smooth = total**0.75 / (total**0.75).sum()
    pmi = (counts.values() / (total[row] * smooth[column])).log()
    ppmi = torch.sparse_coo_tensor(
        counts.indices(), pmi.clamp(min=0), size, check_invariants=True
    )
    u, s, _ = torch.svd_lowrank(ppmi, q=dim, niter=3)
    vectors = u * s.sqrt()
    return F.normalize(vectors, dim=1) * INITIAL * math.sqrt(dim)


def mask_tokens(
    ids: Tensor, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return ids with BERT's 80/10/10 corruption, and the mask of corrupted ones."""

    def chance(p: float) -> Tensor:
        return torch.rand(ids.shape, generator=generator) < p

    chosen = chance(MASKED) & (ids > MASK)
    noise = torch.randint(MASK + 1, vocabulary, ids.shape, generator=generator)
    corrupted = torch.where(chosen & chance(0.9), noise, ids)
    return torch.where(chosen & chance(0.8 / 0.9), MASK, corrupted), chosen


def contrast(pooled: Tensor, files: list[int]) -> Tensor:
    """Return the symmetric InfoNCE loss of partners against the batch.

    Two pairs from one file are not negatives of each other.
    """
    left, right = F.normalize(pooled, dim=-1).chunk(2)
    file = torch.tensor(files)
    same = (file[:, None] == file) & ~torch.eye(len(files), dtype=torch.bool)
    scores = (left @ right.T / TEMPERATURE).masked_fill(same, -math.inf)
    target = torch.arange(len(files))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def pretrain(
    documents: list[list[list[int]]],
    config: BertConfig,
    steps: int,
    pairs: int,
    lr: float,
    seed: int,
) -> tuple[BertModel, float, float]:
    """Train an encoder on masked tokens and on pairs of neighbouring passages.

    The loss is that of masked language modelling (Devlin et al. 2019) plus a contrast
    between neighbouring passages of one file (as in DeCLUTR, Giorgi et al. 2021), which
    trains the pooler. No labels are used.

    Returns
    -------
    model : BertModel
        The encoder with its pooler.
    mlm, contrast : float
        Mean losses of the last hundred steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sampler = Pairs(documents, random.Random(seed))
    encoder = BertModel(config)
    embedding = encoder.embeddings.word_embeddings
    embedding.weight.data = word_vectors(documents, *embedding.weight.shape)
    head = BertForMaskedLM(config).cls
    head.predictions.decoder.weight = embedding.weight
    parameters = list(dict.fromkeys([*encoder.parameters(), *head.parameters()]))
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.06, cycle_momentum=False
    )
    history: list[tuple[float, float]] = []
    start = time.perf_counter()
    # The text is seen only a few times, so dropout would merely slow training down.
    encoder.eval()
    for step in range(1, steps + 1):
        long = step % LONG_EVERY == 0
        count, length = (pairs * SHORT // LONG, LONG) if long else (pairs, SHORT)
        sequences, files = sampler.draw(count, length)
        order = sorted(range(2 * count), key=lambda i: len(sequences[i]))
        hidden, pooled, truth = [], [], []
        # Sequences are grouped by length, since most are short and padding is costly.
        for part in np.array_split(order, 4):
            ids = pad_sequence([torch.tensor(sequences[i]) for i in part], True, PAD)
            corrupted, chosen = mask_tokens(ids, len(embedding.weight), generator)
            out = encoder(corrupted, attention_mask=(ids != PAD).long())
            # Logits over the vocabulary cost more than the encoder: compute few.
            hidden.append(out.last_hidden_state[chosen])
            truth.append(ids[chosen])
            pooled.append(out.pooler_output)
        mlm = F.cross_entropy(head(torch.cat(hidden)), torch.cat(truth))
        pair = contrast(torch.cat(pooled)[torch.tensor(order).argsort()], files)
        optimizer.zero_grad()
        (mlm + pair).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if not long:
            history.append((mlm.item(), pair.item()))
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"{step} {_mean(history)} {seconds:.0f} s", flush=True)
    return encoder.eval(), *_mean(history)


def _mean(history: list[tuple[float, float]]) -> tuple[float, float]:
    mlm, pair = torch.tensor(history[-100:]).mean(0).tolist()
    return mlm, pair


def main() -> None:
    """Train tokenizer and model, and write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = read_documents()
    tokenizer = train_tokenizer([p for d in documents for p in d], args.vocabulary)
    ids = [
        tokenizer(d, add_special_tokens=False, verbose=False).input_ids
        for d in documents
    ]
    print(f"{len(ids)} files, {sum(len(p) for d in ids for p in d)} tokens", flush=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LONG,
        initializer_range=INITIAL,
        type_vocab_size=1,
        pad_token_id=PAD,
    )
    model, mlm, pair = pretrain(ids, config, args.steps, args.pairs, args.lr, args.seed)
    print(f"masked tokens {mlm:.3f}, pairs {pair:.3f}")
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
