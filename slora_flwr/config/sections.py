"""The run config: flat Flower keys in, typed and validated dataclasses out.

This is the one place that knows the names of keys. A field `per_round` of the section
`clients` is the key `clients.per-round`.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slora_flwr.common.text import redact
from slora_flwr.config.errors import ConfigError

Value = bool | int | float | str

METHODS = (
    "slora",
    "sft",
    "lora",
    "ffa-lora",
    "alternate-lora",
    "fedex-lora",
    "flexlora",
    "head-lora",
    "fft",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "head",
)
AGGREGATORS = ("fedavg", "ffa", "alternate", "exact", "flexlora")
# Methods that are LoRA with an aggregator of their own.
OWN_AGGREGATOR = {
    "ffa-lora": "ffa",
    "alternate-lora": "alternate",
    "fedex-lora": "exact",
    "flexlora": "flexlora",
}
TWO_PHASES = ("slora", "head-lora")
DOWNLOAD_DTYPES = ("float32", "float16", "bfloat16", "int8")
# Robust statistics: how many clients more than twice the hostile ones they need.
LEAST_COHORTS = {"median": 1, "trimmed-mean": 1, "krum": 3, "multi-krum": 3}
PARTITIONERS = ("iid", "dirichlet", "pathological", "virtual")
# `data.name` for data that never leaves its node: each trains on its own.
OWN_DATA = "node"


def _refuse(key: str, given: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key} is {given!r}; allowed: {allowed}")


def _one_of(key: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise _refuse(key, given, ", ".join(allowed))


def _at_least(key: str, given: float, low: float) -> None:
    if not (given >= low and math.isfinite(given)):
        raise _refuse(key, given, f"a number of at least {low}")


def _positive(key: str, given: float) -> None:
    if not (given > 0 and math.isfinite(given)):
        raise _refuse(key, given, "a number above 0")


def _fraction(key: str, given: float, *, zero: bool = False, one: bool = False) -> None:
    above, below = given >= 0 if zero else given > 0, given <= 1 if one else given < 1
    if not (above and below):
        low, high = "from 0" if zero else "above 0", "up to 1" if one else "below 1"
        raise _refuse(key, given, f"a number {low} {high}")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone.

    `name` is `embedded`, a local folder, a folder below `$SLORA_ASSETS/models`, or a
    Hub id at `revision`. `dtype` is that of the resident weights; with `bfloat16` the
    computation is in bf16 too, and what an adapter trains stays float32.
    """

    name: str = "embedded"
    revision: str = ""
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.name:
            raise _refuse("model.name", self.name, "embedded, a folder or a Hub id")
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True)
class DataConfig:
    """The text: where it is and which columns hold text and label.

    `name` is `stdlib-docs`, `20newsgroups`, `news-category`, a Hub id, a local file or
    folder, or `node`: see `slora_flwr.data.node_files`. `train` and `test` name splits,
    or files. `text` may name several columns with commas. `labels` are the label names
    of `node`, with commas; empty for all that the nodes have. `validation` holds out
    this share of the training data and evaluates on it in place of the test data: for
    tuning. `max_test` bounds the examples that an evaluation reads, 0 for all.
    """

    name: str = "stdlib-docs"
    train: str = ""
    test: str = ""
    text: str = ""
    label: str = ""
    labels: str = ""
    max_length: int = 64
    validation: float = 0.0
    max_test: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise _refuse("data.name", self.name, "a data set's name or a path")
        _at_least("data.max-length", self.max_length, 4)
        _fraction("data.validation", self.validation, zero=True)
        _at_least("data.max-test", self.max_test, 0)
        if self.labels and self.name != OWN_DATA:
            raise _refuse("data.labels", self.labels, f"empty, or data.name {OWN_DATA}")
        given = [name.strip() for name in self.labels.split(",")]
        if self.labels and (len({*given} - {""}) < len(given) or len(given) < 2):
            raise _refuse("data.labels", self.labels, "two or more names, each once")

    @property
    def is_own(self) -> bool:
        """Whether each node trains on data of its own."""
        return self.name == OWN_DATA


@dataclass(frozen=True)
class ClientsConfig:
    """The client population, how data is dealt to it, and what closes a round.

    `count` 0 means one client per node. `alpha` is for `dirichlet` and `virtual`,
    `classes` (labels per client) for `pathological`, `examples` (per client) for
    `virtual`. A round closes when all have replied, or `deadline` seconds after its
    start with at least `min_replies` clients. `holdout` is the share of each client's
    examples kept from training for evaluation on the client, 0 for none.
    """

    count: int = 20
    per_round: int = 5
    partitioner: str = "dirichlet"
    alpha: float = 0.1
    classes: int = 2
    examples: int = 100
    min_examples: int = 1
    min_nodes: int = 1
    min_replies: int = 1
    deadline: float = 3600.0
    holdout: float = 0.0

    def __post_init__(self) -> None:
        _at_least("clients.count", self.count, 0)
        _at_least("clients.per-round", self.per_round, 1)
        if 0 < self.count < self.per_round:
            raise _refuse(
                "clients.per-round",
                self.per_round,
                f"1 to clients.count, which is {self.count}",
            )
        _one_of("clients.partitioner", self.partitioner, PARTITIONERS)
        _positive("clients.alpha", self.alpha)
        for name in ("classes", "examples", "min_examples", "min_nodes"):
            _at_least(f"clients.{_kebab(name)}", getattr(self, name), 1)
        if not 1 <= self.min_replies <= self.per_round:
            raise _refuse(
                "clients.min-replies",
                self.min_replies,
                f"1 to clients.per-round, which is {self.per_round}",
            )
        _positive("clients.deadline", self.deadline)
        _fraction("clients.holdout", self.holdout, zero=True)


@dataclass(frozen=True)
class RecipeConfig:
    """Local training. `lr` 0 means the adapter's own default (see `DEFAULT_RATES`).

    `prox` is FedProx's mu. `clip_norm` bounds the norm of the trained parameters'
    gradient, 0 for no bound.
    """

    epochs: int = 1
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    prox: float = 0.0
    clip_norm: float = 0.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        _check_recipe("train", self, lowest=1)


@dataclass(frozen=True)
class PhaseRecipeConfig:
    """What one phase's recipe changes of `train`; 0 and "" mean: as in `train`."""

    epochs: int = 0
    batch_size: int = 0
    optimizer: str = ""
    lr: float = 0.0


@dataclass(frozen=True)
class SparseConfig(PhaseRecipeConfig):
    """The sparse phase: `rounds` of `slora`'s rounds are its, `sft` has it alone.

    `rounds` is also the length of `head-lora`'s first phase; 0 ends a sparse phase when
    it stops gaining, see `slora_flwr.config.schedule.has_stopped_gaining`. `budget`
    deals the masks' entries to the matrices, see
    `slora_flwr.adapters.masks.allocate_densities`.
    `schedule` is `fixed`, or `per-round` for a mask drawn anew in each round.
    """

    density: float = 0.01
    rounds: int = 4
    mask: str = "unstructured"
    schedule: str = "fixed"
    budget: str = "uniform"

    def __post_init__(self) -> None:
        _check_recipe("sparse", self, lowest=0)
        _fraction("sparse.density", self.density, one=True)
        _at_least("sparse.rounds", self.rounds, 0)
        _one_of("sparse.mask", self.mask, ("unstructured", "rows", "columns"))
        _one_of("sparse.schedule", self.schedule, ("fixed", "per-round"))
        _one_of("sparse.budget", self.budget, ("uniform", "erdos-renyi", "equal"))


@dataclass(frozen=True)
class LoraConfig(PhaseRecipeConfig):
    """The low-rank phase. `targets` also says which matrices are sparsely trained.

    `targets` is `all-linear` (those of the transformer blocks) or names of modules,
    with commas, matched at the end: `query,value`. `ranks` are ranks of clients, with
    commas: client i has the one at i modulo their number; empty for `rank` everywhere.
    `scaling` divides `alpha` by `rank` or, as rsLoRA does, by its root. `aggregator`:
    for `ffa` and `alternate` see `slora_flwr.adapters.low_rank`, for `exact` and
    `flexlora` `slora_flwr.aggregation.stack`. `base` and `factors`: see
    `slora_flwr.adapters.priming`; `auto` is `b` for `ffa`, whose A stays as it starts,
    and else `balanced`. `start` is that of a phase which nothing primes: `peft`,
    `orthonormal`, or `federa`, see `slora_flwr.adapters.handoff`.
    """

    rank: int = 8
    ranks: str = ""
    alpha: float = 16.0
    scaling: str = "rank"
    targets: str = "all-linear"
    aggregator: str = "fedavg"
    base: str = "residual"
    factors: str = "auto"
    start: str = "peft"

    def __post_init__(self) -> None:
        _check_recipe("lora", self, lowest=0)
        _at_least("lora.rank", self.rank, 1)
        _positive("lora.alpha", self.alpha)
        if not all(part.strip() for part in self.targets.split(",")):
            raise _refuse("lora.targets", self.targets, "all-linear, or module names")
        _one_of("lora.scaling", self.scaling, ("rank", "root-rank"))
        _one_of("lora.aggregator", self.aggregator, AGGREGATORS)
        _one_of("lora.base", self.base, ("residual", "w0", "warm-start"))
        _one_of("lora.factors", self.factors, ("auto", "balanced", "b"))
        _one_of("lora.start", self.start, ("peft", "orthonormal", "federa"))
        given = [part.strip() for part in self.ranks.split(",")]
        if self.ranks and not all(
            part.isdecimal() and 1 <= int(part) <= self.rank for part in given
        ):
            allowed = f"whole numbers from 1 to lora.rank, which is {self.rank}"
            raise _refuse("lora.ranks", self.ranks, f"empty, or {allowed}, with commas")

    def rank_of(self, client: int) -> int:
        """Give a client's rank."""
        if not self.ranks:
            return self.rank
        ranks = self.ranks.split(",")
        return int(ranks[client % len(ranks)])


@dataclass(frozen=True)
class BottleneckConfig(PhaseRecipeConfig):
    """The bottlenecks of `houlsby` and `pfeiffer`: features / `reduction` within."""

    reduction: int = 16

    def __post_init__(self) -> None:
        _check_recipe("bottleneck", self, lowest=0)
        _at_least("bottleneck.reduction", self.reduction, 1)


@dataclass(frozen=True)
class ServerConfig:
    """What becomes of the clients' updates.

    `optimizer` is applied to the mean update; `none` adds `lr` times it. `clip_norm`
    bounds the norm of each client's update, 0 for none, see `slora_flwr.wire.clipping`.
    `robust` puts another statistic in the mean's place, see
    `slora_flwr.aggregation.robust`, for cohorts of which up to `byzantine` clients are
    hostile.
    """

    optimizer: str = "none"
    lr: float = 1.0
    clip_norm: float = 0.0
    robust: str = "none"
    byzantine: int = 0

    def __post_init__(self) -> None:
        _one_of("server.optimizer", self.optimizer, ("none", "fedavgm", "fedadam"))
        _positive("server.lr", self.lr)
        _at_least("server.clip-norm", self.clip_norm, 0)
        _one_of("server.robust", self.robust, ("none", *LEAST_COHORTS))
        _at_least("server.byzantine", self.byzantine, 0)
        if self.robust == "none" and self.byzantine:
            allowed = "0, since server.robust is none"
            raise _refuse("server.byzantine", self.byzantine, allowed)

    @property
    def least_cohort(self) -> int:
        """How many clients a round needs to outvote those that are hostile."""
        return 2 * self.byzantine + LEAST_COHORTS.get(self.robust, 0)


@dataclass(frozen=True)
class AttackConfig:
    """Hostile clients of a simulation, see `slora_flwr.training.attack`.

    `share` of the client population does what `kind` says: `label-flip`, or
    `scaled-update`, whose factor is `scale`.
    """

    kind: str = "none"
    share: float = 0.2
    scale: float = -10.0

    def __post_init__(self) -> None:
        _one_of("attack.kind", self.kind, ("none", "label-flip", "scaled-update"))
        _fraction("attack.share", self.share, one=True)
        if not math.isfinite(self.scale) or self.scale == 1:
            raise _refuse("attack.scale", self.scale, "a number other than 1")


@dataclass(frozen=True)
class UploadConfig:
    """How updates travel, see `slora_flwr.wire`.

    `top_k` is the share of its update's entries that a client sends, those of largest
    `importance`; 0 for all. A sparse phase sends all, since its mask has chosen
    already. With `feedback` a client keeps what rounding and selection leave out, and
    adds it to its next update. `lossless` compresses what that gives.
    """

    dtype: str = "float32"
    top_k: float = 0.0
    importance: str = "magnitude"
    feedback: bool = True
    lossless: bool = False

    def __post_init__(self) -> None:
        _one_of("upload.dtype", self.dtype, (*DOWNLOAD_DTYPES, "int4"))
        _fraction("upload.top-k", self.top_k, zero=True, one=True)
        _one_of("upload.importance", self.importance, ("magnitude", "product"))


@dataclass(frozen=True)
class DownloadConfig:
    """How states travel, see `slora_flwr.wire`.

    With `lossless` a client that has the last state is sent the difference to it.
    """

    dtype: str = "float32"
    lossless: bool = False

    def __post_init__(self) -> None:
        _one_of("download.dtype", self.dtype, DOWNLOAD_DTYPES)


@dataclass(frozen=True)
class PrivacyConfig:
    """Client-level differential privacy, see `slora_flwr.server.privacy`.

    It is on with a `noise_multiplier`, or with an `epsilon` from which that is found;
    the rest counts only then. `delta` 0 means clients.count to the power -1.1.
    `clip_norm` bounds the L2 norm of a client's update, head included; 0 in
    `sparse_clip_norm` and `lora_clip_norm` means: as `clip_norm`.
    """

    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    delta: float = 0.0
    clip_norm: float = 0.0
    sparse_clip_norm: float = 0.0
    lora_clip_norm: float = 0.0

    def __post_init__(self) -> None:
        for known in dataclasses.fields(self):
            _at_least(f"privacy.{_kebab(known.name)}", getattr(self, known.name), 0)
        _fraction("privacy.delta", self.delta, zero=True)
        if self.noise_multiplier and self.epsilon:
            allowed = "0, since privacy.noise-multiplier says how much noise"
            raise _refuse("privacy.epsilon", self.epsilon, allowed)

    @property
    def is_on(self) -> bool:
        """Whether updates are clipped and noise is added to their sum."""
        return bool(self.noise_multiplier or self.epsilon)

    def bound(self, adapter: str) -> float:
        """Give the bound of an update's norm in the phase of an adapter."""
        own = {"sparse": self.sparse_clip_norm, "lora": self.lora_clip_norm}
        return own.get(adapter) or self.clip_norm


@dataclass(frozen=True)
class OutputConfig:
    """Where a run writes, and how often it evaluates; 0 for at the end of each phase.

    `resume` is the directory of a run that goes on, see `slora_flwr.runs.checkpoint`;
    `keep` says how many checkpoints are kept. `target` is a test accuracy from 0 to 1
    whose first round and bytes the summary names; 0 for none.
    """

    dir: str = ""
    resume: str = ""
    keep: int = 2
    eval_every: int = 1
    target: float = 0.0

    def __post_init__(self) -> None:
        for key, path in (("run.dir", self.dir), ("run.resume", self.resume)):
            if path and not Path(path).expanduser().is_absolute():
                # A ServerApp's working directory is not its user's.
                raise _refuse(key, path, "an absolute path, or empty")
        if self.resume and self.dir and Path(self.dir) != Path(self.resume):
            allowed = f"empty, or run.resume, which is {self.resume!r}"
            raise _refuse("run.dir", self.dir, allowed)
        _at_least("run.keep", self.keep, 1)
        _at_least("run.eval-every", self.eval_every, 0)
        _fraction("run.target", self.target, zero=True, one=True)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    method: str = "slora"
    rounds: int = 12
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    train: RecipeConfig = field(default_factory=RecipeConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    upload: UploadConfig = field(default_factory=UploadConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    run: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _at_least("rounds", self.rounds, 1)
        if not 0 <= self.seed < 2**63:
            raise _refuse("seed", self.seed, "a whole number from 0 to 2^63 - 1")
        if self.data.is_own:
            self._check_own_data()
        if self.method in ("fft", "bitfit", "houlsby") and (
            self.model.dtype != "float32"
        ):
            raise _refuse(
                "model.dtype",
                self.model.dtype,
                f"float32 for {self.method}, whose updates bfloat16 weights would "
                "round away",
            )
        self._check_phases()
        self._check_aggregator()
        self._check_robust()
        if self.privacy.is_on:
            self._check_privacy()

    @property
    def aggregator(self) -> str:
        """That of the low-rank phase: the method's own, or `lora.aggregator`."""
        return OWN_AGGREGATOR.get(self.method, self.lora.aggregator)

    def _check_phases(self) -> None:
        if self.method in TWO_PHASES and self.rounds < 2:
            allowed = f"at least 2 for the two phases of {self.method}"
            raise _refuse("rounds", self.rounds, allowed)
        if self.method in TWO_PHASES and self.sparse.rounds >= self.rounds:
            raise _refuse(
                "sparse.rounds",
                self.sparse.rounds,
                f"up to {self.rounds - 1} for {self.method}, since rounds is "
                f"{self.rounds}",
            )
        if self.method == "head-lora" and not self.sparse.rounds:
            raise _refuse("sparse.rounds", 0, "at least 1 for head-lora")
        if self.method == "slora" and self.lora.start != "peft":
            allowed = "peft for slora, whose sparse phase primes the start"
            raise _refuse("lora.start", self.lora.start, allowed)
        redrawn = self.sparse.schedule == "per-round"
        if (
            redrawn
            and self.method in ("slora", "sft")
            and self.model.dtype != "float32"
        ):
            allowed = "float32, since sparse.schedule per-round writes to the weights"
            raise _refuse("model.dtype", self.model.dtype, allowed)
        if (
            redrawn
            and self.method in ("slora", "sft")
            and (self.server.optimizer != "none")
        ):
            # Moments of one round's weights would move the next one's.
            allowed = "none, since sparse.schedule is per-round"
            raise _refuse("server.optimizer", self.server.optimizer, allowed)

    def _check_aggregator(self) -> None:
        given, used = self.lora.aggregator, self.aggregator
        if given not in ("fedavg", used):
            allowed = f"{used}, which is the one of {self.method}"
            raise _refuse("lora.aggregator", given, allowed)
        if self.lora.ranks and used not in ("fedavg", "flexlora"):
            allowed = f"empty, since the aggregator is {used}; or fedavg or flexlora"
            raise _refuse("lora.ranks", self.lora.ranks, allowed)
        kept = self.method == "slora" and self.lora.base == "residual"
        if self.lora.ranks and (kept or self.lora.start == "federa"):
            # A client of a smaller rank would miss what the base gave up.
            key = "lora.base is residual" if kept else "lora.start is federa"
            raise _refuse("lora.ranks", self.lora.ranks, f"empty, since {key}")
        if self.lora.ranks and self.download != DownloadConfig():
            # Slices of a rank are coded by themselves, so that what a client starts
            # from would depend on the others of its node.
            allowed = "empty, or download.dtype float32 without download.lossless"
            raise _refuse("lora.ranks", self.lora.ranks, allowed)
        robust = self.server.robust
        of_products = robust in ("median", "trimmed-mean") and used == "fedavg"
        of_products = of_products and self.method.endswith("lora")
        if used in ("exact", "flexlora") or of_products:
            # Their result is a weight, which no step towards the mean's factors gives.
            by = f"server.robust is {robust}"
            by = by if of_products else f"the aggregator is {used}"
            for name, value, plain in (
                ("optimizer", self.server.optimizer, "none"),
                ("lr", self.server.lr, 1.0),
            ):
                if value != plain:
                    allowed = f"{plain}, since {by}"
                    raise _refuse(f"server.{name}", value, allowed)
        if used == "exact" and self.model.dtype != "float32":
            allowed = "float32, since the aggregator exact adds to the weights"
            raise _refuse("model.dtype", self.model.dtype, allowed)

    def _check_robust(self) -> None:
        server, clients = self.server, self.clients
        if server.robust == "none":
            return
        if self.aggregator in ("exact", "flexlora"):
            allowed = f"none, since the aggregator is {self.aggregator}"
            raise _refuse("server.robust", server.robust, allowed)
        if self.lora.ranks:
            allowed = "none, since lora.ranks has clients of unequal ranks"
            raise _refuse("server.robust", server.robust, allowed)
        least = server.least_cohort
        for name in ("per_round", "min_replies"):
            if getattr(clients, name) < least:
                raise _refuse(
                    f"clients.{_kebab(name)}",
                    getattr(clients, name),
                    f"at least {least}, since server.robust is {server.robust} and "
                    f"server.byzantine is {server.byzantine}",
                )

    def _check_privacy(self) -> None:
        why = "since privacy is on"
        if not self.privacy.clip_norm:
            raise _refuse("privacy.clip-norm", 0.0, f"a number above 0, {why}")
        if self.clients.count < 2:
            allowed = f"at least 2, {why} and depends on the size of the population"
            raise _refuse("clients.count", self.clients.count, allowed)
        if self.clients.holdout:
            # Its metrics are exact functions of what clients hold.
            raise _refuse("clients.holdout", self.clients.holdout, f"0, {why}")
        for key, given, off in (
            ("lora.ranks", self.lora.ranks, ""),
            ("server.clip-norm", self.server.clip_norm, 0.0),
            ("server.robust", self.server.robust, "none"),
            # A round that is held again would be one more release.
            ("run.resume", self.run.resume, ""),
        ):
            if given != off:
                raise _refuse(key, given, f"{'empty' if off == '' else off}, {why}")
        noisy = ("fedavg", "ffa", "alternate")
        if self.aggregator not in noisy:
            # What they give is no function of a mean to which noise is added.
            own = self.method in OWN_AGGREGATOR
            key, given = (
                ("method", self.method) if own else ("lora.aggregator", self.aggregator)
            )
            allowed = f"aggregator {', '.join(noisy)}, {why}"
            raise _refuse(key, given, allowed)

    def _check_own_data(self) -> None:
        where = f"since data.name is {OWN_DATA}"
        if self.attack.kind != "none":
            raise _refuse("attack.kind", self.attack.kind, f"none, {where}")
        if self.clients.count:
            raise _refuse("clients.count", self.clients.count, f"0, {where}")
        if self.data.validation:
            raise _refuse("data.validation", self.data.validation, f"0, {where}")
        if self.data.train and "{}" not in self.data.train:
            allowed = "a path with {} for a simulated node's number, or empty"
            raise _refuse("data.train", self.data.train, f"{allowed}, {where}")
        if not (self.data.test or self.clients.holdout):
            raise _refuse(
                "clients.holdout",
                self.clients.holdout,
                f"above 0, {where} and data.test is empty: there would be nothing to "
                "evaluate on",
            )


def parse(values: Mapping[str, Value]) -> RunConfig:
    """Check a flat run config, as `Context.run_config` holds it.

    Parameters
    ----------
    values : Mapping[str, Value]
        Kebab-case keys, sections joined by a dot; keys left out have their default.

    Raises
    ------
    ConfigError
        For an unknown key, a wrong type or an impossible value; its message names the
        key, what was given and what is allowed.
    """
    fields = {_key(s, f): (s, f) for s, f in _fields()}
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{key} is not a run config key; {hint}")
        if redact(value) != str(value):
            # It would be in config.toml, in checkpoints and on every node.
            raise ConfigError(
                f"{key} is an address with a password or a query, not repeated here; "
                "allowed: names and paths"
            )
        section, known = fields[key]
        sections.setdefault(section, {})[known.name] = _typed(key, value, known.type)
    own = sections.pop("", {})
    classes = {f.name: f.type for f in dataclasses.fields(RunConfig)}
    return RunConfig(**own, **{s: classes[s](**sections[s]) for s in sections})  # type: ignore[operator]


def flatten(config: RunConfig) -> dict[str, Value]:
    """Give a run config back as flat keys, the inverse of `parse`."""
    flat: dict[str, Value] = {}
    for section, known in _fields():
        owner = getattr(config, section) if section else config
        flat[_key(section, known)] = getattr(owner, known.name)
    return flat


def _fields() -> list[tuple[str, dataclasses.Field[Any]]]:
    pairs = []
    for outer in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(outer.type):
            pairs += [(outer.name, inner) for inner in dataclasses.fields(outer.type)]
        else:
            pairs.append(("", outer))
    return pairs


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _key(section: str, known: dataclasses.Field[Any]) -> str:
    return f"{section}.{_kebab(known.name)}" if section else _kebab(known.name)


def _typed(key: str, value: Value, wanted: Any) -> Value:
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        names = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            str: "a string",
        }
        raise _refuse(key, value, names[wanted])
    return value


def _check_recipe(
    section: str, recipe: RecipeConfig | PhaseRecipeConfig, lowest: int
) -> None:
    _at_least(f"{section}.epochs", recipe.epochs, lowest)
    _at_least(f"{section}.batch-size", recipe.batch_size, lowest)
    unset = () if lowest else ("",)
    _one_of(f"{section}.optimizer", recipe.optimizer, ("adamw", "sgd", *unset))
    _at_least(f"{section}.lr", recipe.lr, 0)
    if isinstance(recipe, RecipeConfig):
        for name in ("weight_decay", "momentum", "prox", "clip_norm"):
            _at_least(f"{section}.{_kebab(name)}", getattr(recipe, name), 0)
        _one_of(f"{section}.precision", recipe.precision, ("float32", "bf16"))
