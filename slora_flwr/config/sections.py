"""The keys of the run config: each with its type, default, allowed values and help.

A field `per_round` of the section `clients` is the key `clients.per-round`. A section
checks each of its keys; rules that involve several are in `slora_flwr.config.rules`.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from slora_flwr.common.files import expand
from slora_flwr.common.text import clean_label
from slora_flwr.config.allowed import (
    ABOVE_0_TO_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    POSITIVE,
    allow,
    at_least,
    between,
    listed_by,
    one_of,
)
from slora_flwr.config.methods import list_aggregators, list_methods

Value = bool | int | float | str

# Integers are accepted as floats; no other type is converted.
STRICT = ConfigDict(strict=True)
# Clients that each robust statistic needs beyond twice the hostile ones.
LEAST_COHORTS = {"median": 1, "trimmed-mean": 1, "krum": 3, "multi-krum": 3}
PARTITIONERS = ("iid", "dirichlet", "pathological", "virtual", "natural")
TASKS = ("classification", "causal-lm")
# Libraries that can record a run, by the names of their extras.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
TEMPLATES = ("auto", "chat", "alpaca", "plain")
# `data.name` where each node trains on data of its own.
# By `upload.dtype`, the least steps from 0 to the largest value of a secure sum's grid:
# about as many as the type itself tells apart.
GRID_LEVELS = {"float32": 2**15, "float16": 2**11, "bfloat16": 2**8}
GRID_LEVELS |= {"int8": 127, "int4": 7}
# The largest magnitude of a secure sum, in 32 bits.
MOST_SUM = 2**31 - 1
# The models that come with the package `slora_embedded`.
EMBEDDED_MODELS = ("embedded", "embedded-llama")
OWN_DATA = "node"
# Of privacy, whatever the population: a run publishes one's data with at most this
# probability.
LARGEST_DELTA = 0.01

# Beyond what any run needs, and within what a node can be asked to hold or wait for.
_MOST_CLIENTS, _MOST_ROUNDS, _MOST_EPOCHS = 10**7, 10**6, 1000
_MOST_EXAMPLES, _MOST_TOKENS = 4096, 2**17

_DTYPES = ("float32", "float16", "bfloat16", "int8")
_SEEDS = "a whole number from 0 to 2^63 - 1"


def _names_in(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _are_trackers(text: str) -> bool:
    names = _names_in(text)
    return len({*names}) == len(names) and {*names} <= {*TRACKERS}


Natural = Annotated[int, at_least(0)]
Count = Annotated[int, at_least(1)]
NotNegative = Annotated[float, at_least(0)]
Positive = Annotated[float, POSITIVE]
OptimizerOrNone = Annotated[
    str, allow("adamw, sgd, or empty", ("adamw", "sgd", "").__contains__)
]
# A rule checks the upper limit.
Replies = Annotated[int, allow("1 to clients.per-round", lambda count: True)]
# Empty or a name; the Hub's library looks it up as a path below its cache.
_REVISION = re.compile(r"(\w[\w./-]*)?", re.ASCII)
# A ServerApp's working directory is not its user's. A node checks these keys too, so
# the test looks at the text alone: what `~somebody` is would tell of the node's users.
AbsolutePath = Annotated[
    str,
    allow(
        "an absolute path, or empty",
        lambda path: not path or Path(path).is_absolute() or path.split("/")[0] == "~",
    ),
]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The backbone."""

    name: Annotated[str, allow("embedded, a folder or a Hub id", bool)] = Field(
        default="embedded",
        description="The pretrained model: `embedded`, a classifier; `embedded-llama`, "
        "a language model; a local folder, a `.gguf` file, the name of a folder below "
        "`$SLORA_ASSETS/models`, or a Hub id.",
    )
    revision: Annotated[
        str,
        allow(
            "a branch, a tag or a commit, or empty",
            lambda name: ".." not in name and bool(_REVISION.fullmatch(name)),
        ),
    ] = Field(default="", description="The revision of a Hub id.")
    dtype: Annotated[str, one_of("float32", "bfloat16")] = Field(
        default="float32",
        description="The type of the resident weights. With `bfloat16` the computation "
        "is in bf16 too, and what an adapter trains stays float32; methods that write "
        "to the weights, such as `fft`, need `float32`.",
    )
    quantize: Annotated[
        str, allow("empty, 8bit, 4bit", ("", "8bit", "4bit").__contains__)
    ] = Field(
        default="",
        description="The bits in which the blocks' linear layers are held, frozen: "
        "`8bit` (LLM.int8()) or `4bit` (NF4), by bitsandbytes "
        "(`pip install 'slora-flwr[quantize]'`); empty for those of `model.dtype`. "
        "Embeddings, normalisations and output layers stay as they are. Methods that "
        "write to these weights, such as `fft`, need it empty.",
    )


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The text: where it is, and which columns hold text and label."""

    name: Annotated[str, allow("a data set's name or a path", bool)] = Field(
        default="stdlib-docs",
        description="The data set: `stdlib-docs`, `stdlib-summaries`, `20newsgroups`, "
        "`news-category`, a local file or folder, a name below `$SLORA_ASSETS/data`, a "
        "Hub id, or `node`: each node trains on data of its own.",
    )
    train: str = Field(
        default="",
        description="The split or file to train on; empty for `train`. With `node` in "
        "a simulation, a path in which `{}` stands for the node's number.",
    )
    test: str = Field(
        default="",
        description="The split or file to evaluate on. Empty for the data set's own "
        "test split or, where it has none, a fifth of the training data, chosen by a "
        "hash. With `node`, a file on the server, or empty.",
    )
    text: str = Field(
        default="",
        description="The column that holds the text or, for `causal-lm`, the prompt; "
        "several, separated by commas, are joined.",
    )
    label: str = Field(default="", description="The column that holds the label.")
    response: str = Field(
        default="",
        description="The column that holds the response, for `causal-lm`; empty to "
        "learn the text itself.",
    )
    messages: str = Field(
        default="",
        description="The column that holds conversations, for `causal-lm`: lists of "
        "messages with `role` and `content`, of which those of the `assistant` are "
        "learned. It takes the place of text and response.",
    )
    template: Annotated[str, one_of(*TEMPLATES)] = Field(
        default="auto",
        description="What is written around prompts and responses, for `causal-lm`: "
        "the tokenizer's `chat` template, `alpaca`, or a line end (`plain`); `auto` is "
        "`chat` if the tokenizer has one and else `plain`.",
    )
    labels: str = Field(
        default="",
        description="The label names, separated by commas, with `node` or privacy; "
        "examples with others are left out. Empty for all that the nodes have when the "
        "run begins or, with privacy, those of the test data.",
    )
    max_length: Annotated[int, between(4, _MOST_TOKENS)] = Field(
        default=64, description="The number of tokens after which a text is cut off."
    )
    validation: Annotated[float, FROM_0_BELOW_1] = Field(
        default=0.0,
        description="The share of the training data that is held out and evaluated on "
        "in place of the test data, for tuning.",
    )
    max_test: Natural = Field(
        default=0,
        description="The most test examples that an evaluation reads, chosen by a "
        "hash; 0 for all.",
    )

    @property
    def label_names(self) -> list[str]:
        """The names in `labels`, sorted."""
        given = map(clean_label, self.labels.split(","))
        return sorted(name for name in given if name)

    @property
    def is_own(self) -> bool:
        """Whether each node trains on its own data."""
        return self.name == OWN_DATA

    @property
    def tested_on(self) -> str:
        """Whose texts accuracies are of."""
        held_out = self.is_own and not self.test
        return "clients' held-out texts" if held_out else "test texts"


@dataclass(frozen=True, config=STRICT)
class ClientsConfig:
    """The client population, how data is dealt to it, and what closes a round."""

    count: Annotated[int, between(0, _MOST_CLIENTS)] = Field(
        default=20, description="The client population; 0 for one client per node."
    )
    per_round: Count = Field(
        default=5,
        description="The number of clients that train in a round, up to "
        "`clients.count`.",
    )
    partitioner: Annotated[str, one_of(*PARTITIONERS)] = Field(
        default="dirichlet",
        description="How the training data is dealt to clients. With `virtual`, for "
        "populations larger than the data, each client's examples are drawn by the "
        "seed and the client's id. With `natural`, each client has the examples of one "
        "value of the column `clients.by`, those with the most examples first.",
    )
    by: str = Field(
        default="",
        description="The column by whose values examples are dealt to clients; empty "
        "for the label.",
    )
    alpha: Positive = Field(
        default=0.1,
        description="The concentration of `dirichlet` and `virtual`; smaller is more "
        "skewed.",
    )
    classes: Count = Field(
        default=2, description="The number of labels of a client, for `pathological`."
    )
    examples: Count = Field(
        default=100, description="The number of examples of a client, for `virtual`."
    )
    min_examples: Count = Field(
        default=1, description="The fewest examples that every client must have."
    )
    weight: Annotated[str, one_of("examples", "tokens")] = Field(
        default="examples",
        description="What a client weighs in means of updates: its `examples`, or the "
        "`tokens` that it learns to predict. Reports and events then count its tokens "
        "as they else count its examples.",
    )
    max_weight: Natural = Field(
        default=0,
        description="The most examples that a client counts as in means and in pooled "
        "evaluations, for which it evaluates on no more; 0 for no limit.",
    )
    min_nodes: Count = Field(
        default=1, description="The number of nodes to wait for before the first round."
    )
    min_replies: Replies = Field(
        default=1,
        description="The number of clients whose updates a round needs. A round with "
        "fewer is tried once more; then the run stops.",
    )
    deadline: Positive = Field(
        default=3600.0,
        description="Seconds after which a round closes without the clients that have "
        "not replied. It also bounds the wait for a node's first description of "
        "itself.",
    )
    holdout: Annotated[float, FROM_0_BELOW_1] = Field(
        default=0.0,
        description="The share of each client's examples that it evaluates on and does "
        "not train on; 0 for none.",
    )

    def weigh(self, examples: int) -> int:
        """Return how many examples a client with so many counts as."""
        return min(examples, self.max_weight) if self.max_weight else examples


@dataclass(frozen=True, config=STRICT)
class RecipeConfig:
    """Local training, in every phase that does not override it."""

    epochs: Annotated[int, between(1, _MOST_EPOCHS)] = Field(
        default=1, description="Local passes over a client's examples."
    )
    steps: Natural = Field(
        default=0,
        description="The most steps of a client in a round, after which it ends even "
        "within an epoch; 0 for no limit.",
    )
    batch_size: Annotated[int, between(1, _MOST_EXAMPLES)] = Field(
        default=16, description="The number of examples of a step."
    )
    accumulate: Annotated[int, between(1, _MOST_EXAMPLES)] = Field(
        default=1,
        description="The number of parts of a step's batch, whose gradients are added "
        "up: a step needs less memory, and its result is the same up to rounding.",
    )
    tokens: Natural = Field(
        default=0,
        description="The most tokens, padding included, that a forward pass reads at a "
        "time, in training and evaluation; 0 for no limit. Parts of a step are split "
        "until they fit, down to single texts.",
    )
    checkpointing: bool = Field(
        default=False,
        description="Whether a step keeps only what goes into each transformer block "
        "and computes the rest again for the gradients: less memory, about a third "
        "more time, the same result.",
    )
    optimizer: Annotated[str, one_of("adamw", "sgd")] = Field(
        default="adamw", description="The local optimiser."
    )
    lr: NotNegative = Field(
        default=0.0, description="The learning rate; 0 for the adapter's default."
    )
    head_lr: NotNegative = Field(
        default=0.0,
        description="The learning rate of a classifier's head, which usually begins at "
        "random and may need a higher rate than pretrained weights; 0 for that of the "
        "rest. Language models have no such head.",
    )
    schedule: Annotated[str, one_of("constant", "cosine", "linear")] = Field(
        default="constant",
        description="The learning rate's course over the rounds of each phase.",
    )
    warmup_rounds: Natural = Field(
        default=0,
        description="The number of rounds at the start of each phase over which the "
        "learning rate grows to its full value.",
    )
    weight_decay: NotNegative = Field(
        default=0.0,
        description="Weight decay, on trained values only: of sparse values towards "
        "the pretrained ones, of factors whose start the base subtracts (`residual`, "
        "`federa`) towards that start, and of all others towards 0. Times a phase's "
        "learning rate it may be 0.1 at most.",
    )
    momentum: Annotated[float, FROM_0_BELOW_1] = Field(
        default=0.0, description="The momentum of `sgd`."
    )
    prox: NotNegative = Field(
        default=0.0,
        description="FedProx's mu; 0 for none. Times a phase's learning rate it may be "
        "0.1 at most.",
    )
    clip_norm: NotNegative = Field(
        default=0.0,
        description="The bound of the norm of the trained parameters' gradient; 0 for "
        "none.",
    )
    precision: Annotated[str, one_of("auto", "float32", "bf16")] = Field(
        default="auto",
        description="The precision of products with the backbone, in training and "
        "evaluation; `bf16` is autocast. `auto` is bf16 where the processor or card "
        "multiplies it natively, else float32, as each node finds by itself; with "
        "privacy of examples, training is in float32.",
    )

    def steps_of(self, examples: int) -> int:
        """Return a client's steps in a round."""
        steps = self.epochs * -(-examples // self.batch_size)
        return min(steps, self.steps) if self.steps else steps

    def fewest_read(self, examples: int) -> int:
        """Return how many of a client's examples its steps in a round read at least."""
        if not self.steps or not examples:
            return examples
        smallest = examples // -(-examples // self.batch_size)
        return min(examples, self.steps * smallest)

    def most_rows(self, length: int) -> int:
        """Return the most texts of a length that a forward pass of training reads."""
        rows = -(-self.batch_size // self.accumulate)
        return max(1, min(rows, self.tokens // length)) if self.tokens else rows


@dataclass(frozen=True, config=STRICT)
class PhaseRecipeConfig:
    """One phase's overrides of `train`; 0 and "" keep its values."""

    epochs: Annotated[int, between(0, _MOST_EPOCHS)] = Field(
        default=0,
        description="Overrides `train.epochs` in this phase; 0 keeps it.",
    )
    batch_size: Annotated[int, between(0, _MOST_EXAMPLES)] = Field(
        default=0,
        description="Overrides `train.batch-size` in this phase; 0 keeps it.",
    )
    optimizer: OptimizerOrNone = Field(
        default="",
        description="Overrides `train.optimizer` in this phase; empty keeps it.",
    )
    lr: NotNegative = Field(
        default=0.0, description="Overrides `train.lr` in this phase; 0 keeps it."
    )
    head_lr: NotNegative = Field(
        default=0.0, description="Overrides `train.head-lr` in this phase; 0 keeps it."
    )


@dataclass(frozen=True, config=STRICT)
class SparseConfig(PhaseRecipeConfig):
    """The sparse phase."""

    density: Annotated[float, ABOVE_0_TO_1] = Field(
        default=0.01,
        description="The share of the entries of the target matrices that the mask "
        "lets train.",
    )
    rounds: Annotated[
        int, allow("a number of at least 0, or -1", lambda x: x >= -1)
    ] = Field(
        default=-1,
        description="The length of a method's first phase, where it has two: sparse "
        "for `slora`, the head alone for `head-lora`. -1 is a third of `rounds`, "
        "rounded down, but at least 1. 0 ends a sparse phase when it stops gaining, "
        "after half of the rounds at the latest.",
    )
    mask: Annotated[str, one_of("unstructured", "rows", "columns")] = Field(
        default="unstructured",
        description="The structure of the mask: single entries, or whole output or "
        "input features of each matrix (`rows`, `columns`), whose training step is "
        "quicker and whose SVD is exact.",
    )
    schedule: Annotated[str, one_of("fixed", "per-round")] = Field(
        default="fixed",
        description="One mask for the whole phase (`fixed`), or a new one for each "
        "round, the same for its whole cohort (`per-round`).",
    )
    budget: Annotated[str, one_of("uniform", "erdos-renyi", "equal")] = Field(
        default="uniform",
        description="How the density is dealt to the matrices: each the same share "
        "(`uniform`, the paper's), each as many entries (`equal`), or m + n parts to "
        "an m x n matrix (`erdos-renyi`).",
    )


@dataclass(frozen=True, config=STRICT)
class LoraConfig(PhaseRecipeConfig):
    """The low-rank phase."""

    rank: Count = Field(default=8, description="The rank of the factors.")
    ranks: str = Field(
        default="",
        description="Ranks of clients, each up to `lora.rank`, separated by commas: "
        "client i has the one at i modulo their number, and is sent the first slices "
        "of the factors; empty for `lora.rank` everywhere. They need an aggregator "
        "that takes them, `fedavg` or `flexlora`, and a base that gave up nothing for "
        "the start.",
    )
    alpha: Positive = Field(
        default=16.0, description="The adapter is scaled by alpha / rank."
    )
    scaling: Annotated[str, one_of("rank", "root-rank")] = Field(
        default="rank",
        description="What divides `lora.alpha`: the rank, or its square root, as in "
        "rsLoRA (`root-rank`).",
    )
    targets: Annotated[
        str,
        allow(
            "all-linear, or module names",
            lambda names: all(part.strip() for part in names.split(",")),
        ),
    ] = Field(
        default="all-linear",
        description="The target matrices: all linear layers of the transformer blocks "
        "(`all-linear`), or ends of module names, separated by commas, such as "
        "`query,value`. The mask of a sparse phase covers the same matrices.",
    )
    aggregator: Annotated[str, listed_by(list_aggregators)] = Field(
        default="fedavg",
        description="The aggregator of a low-rank phase whose method has none of its "
        "own: `lora`, and the second phase of `slora` and `head-lora`. The methods "
        "`ffa-lora`, `alternate-lora`, `fedex-lora` (`exact`) and `flexlora` are LoRA "
        "with the other ones.",
    )
    base: Annotated[str, one_of("residual", "w0", "warm-start")] = Field(
        default="residual",
        description="The base of a primed phase. `residual` starts from the sparse "
        "phase's function exactly; `w0` keeps the public checkpoint, and of the change "
        "what the rank keeps; `warm-start` is a control, the sparsely trained weights "
        "with LoRA's ordinary start.",
    )
    factors: Annotated[str, one_of("auto", "balanced", "b")] = Field(
        default="auto",
        description="Where a start from an SVD has its singular values: their roots in "
        "both factors (`balanced`), or all of them in B (`b`). `auto` is `b` where A "
        "is frozen, as with `ffa`, and else `balanced`.",
    )
    start: Annotated[str, one_of("peft", "orthonormal", "federa")] = Field(
        default="peft",
        description="The start of a low-rank phase that no sparse phase primes: A "
        "random and B zero (`peft`), A with random orthonormal rows (`orthonormal`), "
        "or the SVD of the weights themselves, which the base gives up (`federa`, as "
        "FeDeRA and PiSSA have it).",
    )

    def rank_of(self, client: int) -> int:
        """Return a client's rank."""
        if not self.ranks:
            return self.rank
        ranks = self.ranks.split(",")
        return int(ranks[client % len(ranks)])


@dataclass(frozen=True, config=STRICT)
class BottleneckConfig(PhaseRecipeConfig):
    """The bottlenecks of `houlsby` and `pfeiffer`."""

    reduction: Count = Field(
        default=16, description="The model's features over those of a bottleneck."
    )


@dataclass(frozen=True, config=STRICT)
class ServerConfig:
    """How the server combines the clients' updates."""

    optimizer: Annotated[str, one_of("none", "fedavgm", "fedadam")] = Field(
        default="none",
        description="What is done with the mean update; `none` adds `server.lr` times "
        "it. The optimiser starts anew with each phase.",
    )
    lr: NotNegative = Field(
        default=0.0,
        description="The learning rate of the server; 0 for the optimiser's default: "
        "1.0 for `none`, 0.3 for `fedavgm`, 0.01 for `fedadam`, where it is about the "
        "distance that a weight moves in a round.",
    )
    average: Annotated[str, one_of("auto", "none", "ema", "growing")] = Field(
        default="auto",
        description="The average of the global states, which is evaluated and "
        "exported; within a phase, training goes on from the last state. `ema` is an "
        "exponential moving average; of `growing` the n-th state weighs n·(n + 1); "
        "`none` uses the last state. `auto` is `ema`, but `none` in phases whose "
        "rounds change the base if clients evaluate.",
    )
    average_decay: Annotated[float, FROM_0_BELOW_1] = Field(
        default=0.8, description="The decay of `server.average` `ema`."
    )
    handoff: Annotated[str, one_of("average", "last")] = Field(
        default="average",
        description="What the next phase starts from: the `average` of "
        "`server.average`, or the `last` state, which is noisier, but ahead of the "
        "average while a phase still gains fast. Where the average goes on over a "
        "handoff, it goes on from that state too.",
    )
    clip_norm: NotNegative = Field(
        default=0.0,
        description="The bound of the L2 norm of each client's update, which clients "
        "keep to and the server checks; 0 for none.",
    )
    robust: Annotated[str, one_of("none", *LEAST_COHORTS)] = Field(
        default="none", description="A robust statistic in the mean's place."
    )
    byzantine: Natural = Field(
        default=0,
        description="The number of clients of a cohort that may be hostile, for "
        "`server.robust`.",
    )

    @property
    def least_cohort(self) -> int:
        """The number of clients that a round needs to outvote the hostile ones."""
        return 2 * self.byzantine + LEAST_COHORTS.get(self.robust, 0)


@dataclass(frozen=True, config=STRICT)
class UploadConfig:
    """How updates are sent."""

    dtype: Annotated[str, one_of(*_DTYPES, "int4")] = Field(
        default="float32", description="The type in which updates travel."
    )
    top_k: Annotated[float, FROM_0_TO_1] = Field(
        default=0.0,
        description="The share of its update's entries that a client sends, of the "
        "adapter's and of the head's; 0 for all. A sparse phase sends all, since its "
        "mask has chosen already.",
    )
    importance: Annotated[str, one_of("magnitude", "product")] = Field(
        default="magnitude",
        description="Which entries `upload.top-k` sends: the largest (`magnitude`), or "
        "those of a LoRA factor that change B·A most (`product`).",
    )
    feedback: bool = Field(
        default=True,
        description="Whether a client keeps what rounding and selection leave out, and "
        "adds it to its next update.",
    )
    lossless: bool = Field(
        default=False,
        description="Whether updates are compressed as well, where that makes them "
        "smaller.",
    )


@dataclass(frozen=True, config=STRICT)
class DownloadConfig:
    """How states are sent."""

    dtype: Annotated[str, one_of(*_DTYPES)] = Field(
        default="float32", description="The type in which states and bases travel."
    )
    base_dtype: Annotated[str, one_of(*_DTYPES)] = Field(
        default="int8",
        description="The type in which the factors travel that a base gives up for the "
        "start, as with `lora.base` `residual` and `lora.start` `federa`. Training "
        "starts from the factors as they are read, so the function is not changed.",
    )
    lossless: bool = Field(
        default=False,
        description="Whether states and bases are compressed as well, where that makes "
        "them smaller. A client that has the last state is sent the difference to it.",
    )


@dataclass(frozen=True, config=STRICT)
class AttackConfig:
    """Hostile clients of a simulation."""

    kind: Annotated[str, one_of("none", "label-flip", "scaled-update")] = Field(
        default="none",
        description="What hostile clients do: train on labels that are rotated by one "
        "class (`label-flip`), or send `attack.scale` times their update "
        "(`scaled-update`). For simulations.",
    )
    share: Annotated[float, ABOVE_0_TO_1] = Field(
        default=0.2,
        description="The share of the client population that is hostile, drawn by the "
        "seed.",
    )
    scale: Annotated[
        float,
        allow("a number other than 1", lambda x: math.isfinite(x) and x != 1),
    ] = Field(default=-10.0, description="The factor of `scaled-update`.")


@dataclass(frozen=True, config=STRICT)
class PrivacyConfig:
    """Differential privacy, on with a noise multiplier or an epsilon."""

    unit: Annotated[str, one_of("client", "example")] = Field(
        default="client",
        description="Whom the guarantee protects: a `client` with all that it holds, "
        "by noise that the server adds to sums of updates, or each `example`, by noise "
        "that every client adds to its own gradients (DP-SGD).",
    )
    noise_multiplier: Annotated[
        float,
        allow(
            "a number from 0.001 up to 1000000, or 0",
            # Epsilon is beyond 10^5 at the lower end. Far below, the accountant's
            # figures overflow.
            lambda x: x == 0 or 1e-3 <= x <= 1e6,
        ),
    ] = Field(
        default=0.0,
        description="The standard deviation of the noise on the sum of updates, or of "
        "a step's gradients, over `privacy.clip-norm`; 0 for none, or for what "
        "`privacy.epsilon` needs.",
    )
    epsilon: NotNegative = Field(
        default=0.0,
        description="The epsilon of the whole run, from which the noise is found; 0 "
        "for none. With `privacy.unit` `example` no client trains beyond it.",
    )
    delta: Annotated[float, at_least(0), FROM_0_BELOW_1] = Field(
        default=0.0,
        description="The delta of the guarantee, up to 0.01 and below 1 / "
        "`clients.count`; 0 for `clients.count` to the power -1.1. With `privacy.unit` "
        "`example` a client's number of examples stands in its place.",
    )
    clip_norm: NotNegative = Field(
        default=0.0,
        description="The bound of the L2 norm of a client's update, or of an example's "
        "gradient, head included; above 0 where privacy is on.",
    )
    sparse_clip_norm: NotNegative = Field(
        default=0.0,
        description="Overrides `privacy.clip-norm` in a sparse phase; 0 keeps it.",
    )
    lora_clip_norm: NotNegative = Field(
        default=0.0,
        description="Overrides `privacy.clip-norm` in a low-rank phase; 0 keeps it.",
    )
    trust: Annotated[str, one_of("server", "sums")] = Field(
        default="server",
        description="Who adds the noise: the `server`, to sums that it knows; or, with "
        "`secure.aggregation`, the clients, in shares, so that the server learns "
        "noised `sums` alone.",
    )
    participations: Natural = Field(
        default=0,
        description="With trust `sums`, the most rounds in which a client takes part, "
        "for which its noise is; 0 for as many as all rounds need if clients take "
        "turns.",
    )

    @property
    def is_on(self) -> bool:
        """Whether updates are clipped and noise is added to their sum."""
        return self.unit == "client" and bool(self.noise_multiplier or self.epsilon)

    @property
    def of_examples(self) -> bool:
        """Whether clients clip and noise the gradients of their examples."""
        return self.unit == "example" and bool(self.noise_multiplier or self.epsilon)

    def delta_of(self, population: int) -> float:
        """Return the delta of the guarantee in a population, of clients or examples."""
        return self.delta or population**-1.1

    def allows_delta(self, population: int) -> bool:
        """Return whether no run may publish the data of one of so many."""
        delta = self.delta_of(population)
        return delta <= LARGEST_DELTA and delta * population < 1

    def bound(self, section: str) -> float:
        """Return the bound of an update's norm in a phase with a config section."""
        own: float = getattr(self, f"{section}_clip_norm", 0.0)
        return own or self.clip_norm


@dataclass(frozen=True, config=STRICT)
class SecureConfig:
    """Secure aggregation: the server learns the sum of a round's updates alone."""

    aggregation: bool = Field(
        default=False,
        description="Whether nodes mask their updates, so that the server learns their "
        "sum and nothing else of them.",
    )
    clip: NotNegative = Field(
        default=0.0,
        description="The bound of the L2 norm of a client's update, head included, to "
        "which clients clip it; 0 for `server.clip-norm`. Values travel on a grid that "
        "is as fine as the bound is small. With privacy it is `privacy.clip-norm`.",
    )
    sparse_clip: NotNegative = Field(
        default=0.0,
        description="Overrides `secure.clip` in a sparse phase; 0 keeps it.",
    )
    lora_clip: NotNegative = Field(
        default=0.0,
        description="Overrides `secure.clip` in a low-rank phase; 0 keeps it.",
    )
    threshold: Annotated[
        float, allow("a number from 0.5 below 1", lambda x: 0.5 <= x < 1)
    ] = Field(
        default=0.66,
        description="The share of a node's neighbours, itself among them, of whom more "
        "must answer to the end: with fewer the round's sum is never read.",
    )
    colluding: Annotated[float, FROM_0_BELOW_1] = Field(
        default=0.05,
        description="The share of a round's nodes that may help the server against "
        "others. Beyond 30 nodes it decides with how many others each node masks. With "
        "`privacy.trust` `sums` it is also the share of `clients.per-round` whose "
        "noise may be known; a node knows that of all its clients.",
    )


@dataclass(frozen=True, config=STRICT)
class OutputConfig:
    """Where a run writes, and how often it evaluates."""

    dir: AbsolutePath = Field(
        default="",
        description="The run directory, new or empty; empty for a folder of its own "
        "below `$SLORA_HOME/runs`.",
    )
    resume: AbsolutePath = Field(
        default="",
        description="The directory of an interrupted run, which goes on there; or one "
        "of its checkpoints, from whose round it goes on; empty for a new run.",
    )
    keep: Count = Field(
        default=2,
        description="The number of checkpoints of the last rounds that are kept, "
        "beside the best round's.",
    )
    eval_every: Natural = Field(
        default=1,
        description="Rounds between evaluations; 0 for the end of each phase only.",
    )
    eval_plain: bool = Field(
        default=False,
        description="Whether the last state is evaluated too, beside the average of "
        "`server.average`; its metrics begin with `plain_`.",
    )
    generate: Natural = Field(
        default=0,
        description="The number of test examples, chosen by a hash, to which each "
        "evaluation of a `causal-lm` generates responses, for exact match and ROUGE-L; "
        "0 for none.",
    )
    max_tokens: Annotated[int, between(1, _MOST_EXAMPLES)] = Field(
        default=64, description="The most tokens of a response of `run.generate`."
    )
    choices: AbsolutePath = Field(
        default="",
        description="A file of multiple-choice questions on the server, with columns "
        "`question`, `choices` and `answer`, that each evaluation of a `causal-lm` "
        "answers; empty for none.",
    )
    target: Annotated[float, at_least(0)] = Field(
        default=0.0,
        description="A test accuracy or, for `causal-lm`, a perplexity whose first "
        "round and bytes the summary names; 0 for none.",
    )
    metrics_port: Annotated[int, between(0, 65535)] = Field(
        default=0,
        description="The port on which the server answers Prometheus while the run "
        "goes on (`pip install 'slora-flwr[metrics]'`), reached from its own machine "
        "alone unless the environment variable SLORA_METRICS_HOST names another "
        "address; 0 for none.",
    )

    @property
    def resumed(self) -> Path:
        """The directory of the run that `resume` names."""
        return expand(self.resumed_as_written)

    @property
    def resumed_as_written(self) -> Path:
        """The directory of the run that `resume` names, with its `~` if it has one."""
        path = Path(self.resume)
        return path.parent.parent if path.suffix == ".safetensors" else path


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole run; `slora_flwr.config.parse` checks what its keys allow together."""

    method: Annotated[str, listed_by(list_methods)] = Field(
        default="slora", description="The method: what is trained, in which phases."
    )
    task: Annotated[str, one_of(*TASKS)] = Field(
        default="classification",
        description="What the model learns: the labels of texts (`classification`), or "
        "responses to prompts, token by token (`causal-lm`).",
    )
    rounds: Annotated[int, between(1, _MOST_ROUNDS)] = Field(
        default=12, description="The number of rounds of all phases."
    )
    seed: Annotated[int, allow(_SEEDS, lambda seed: 0 <= seed < 2**63)] = Field(
        default=0,
        description="The seed of masks, cohorts, partitions, batches and the head's "
        "start.",
    )
    track: Annotated[
        str,
        allow(
            f"{', '.join(TRACKERS)}, each once, with commas, or empty", _are_trackers
        ),
    ] = Field(
        default="",
        description="The trackers that record the run, such as `tensorboard,wandb`; "
        "each is an extra (`pip install 'slora-flwr[wandb]'`).",
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    train: RecipeConfig = RecipeConfig()
    sparse: SparseConfig = SparseConfig()
    lora: LoraConfig = LoraConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()
    server: ServerConfig = ServerConfig()
    upload: UploadConfig = UploadConfig()
    download: DownloadConfig = DownloadConfig()
    attack: AttackConfig = AttackConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig = SecureConfig()
    run: OutputConfig = OutputConfig()

    def __post_init__(self) -> None:
        if self.sparse.rounds == -1:
            # A method of one phase has a constant, since a study's runs are named after
            # what differs from the defaults.
            is_split = len(list_methods()[self.method].phases) > 1
            first = max(1, self.rounds // 3) if is_split else 4
            sparse = replace(self.sparse, rounds=first)
            object.__setattr__(self, "sparse", sparse)  # it is frozen

    @property
    def trackers(self) -> list[str]:
        """The names in `track`."""
        return _names_in(self.track)

    @property
    def shares_noise(self) -> bool:
        """Whether clients add noise, each a share, before their updates are summed."""
        return self.privacy.is_on and self.privacy.trust == "sums"

    @property
    def participations(self) -> int:
        """The most rounds in which a client takes part, where `shares_noise`."""
        turns = math.ceil(self.rounds * self.clients.per_round / self.clients.count)
        return self.privacy.participations or turns

    @property
    def sharers(self) -> int:
        """The clients whose shares of the noise suffice, where `shares_noise`.

        Of the fewest that a round ends with, those that may collude count for nothing.
        """
        clients = self.clients
        colluding = math.ceil(self.secure.colluding * clients.per_round)
        return clients.min_replies - colluding

    def secure_bound(self, section: str) -> float:
        """Return the bound of an update's norm with secure aggregation.

        Parameters
        ----------
        section : str
            The config section of the phase's adapter.
        """
        if self.privacy.is_on:
            return self.privacy.bound(section)
        own: float = getattr(self.secure, f"{section}_clip", 0.0)
        return own or self.secure.clip or self.server.clip_norm

    @property
    def most_weight_of_cohort(self) -> int:
        """The most that a cohort weighs with secure aggregation.

        With privacy all clients weigh the same, else as `clients.max-weight` says.
        """
        each = 1 if self.privacy.is_on else self.clients.max_weight
        return self.clients.per_round * each

    def most_weight(self, examples: int) -> int:
        """Return the most that a client with so many examples weighs in means."""
        by_tokens = self.clients.weight == "tokens"
        return self.clients.weigh(examples * (self.data.max_length if by_tokens else 1))
