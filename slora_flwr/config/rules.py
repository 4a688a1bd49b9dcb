"""The rules of a run config that involve several keys.

Rules about keys alone come first. The others use the method's phases, adapters and
aggregators, which import torch.
"""

from collections.abc import Sequence
from pathlib import Path

from slora_flwr.common.text import printable
from slora_flwr.config.errors import refuse
from slora_flwr.config.methods import (
    AGGREGATORS,
    find_adapter,
    find_aggregator,
    list_methods,
)
from slora_flwr.config.schedule import Phase, make_schedule
from slora_flwr.config.sections import (
    GRID_LEVELS,
    LARGEST_DELTA,
    MOST_SUM,
    OWN_DATA,
    LoraConfig,
    RunConfig,
)

# Robust statistics of single entries. Entries of LoRA's factors are not comparable if
# clients train both, so the statistic is then that of the products, which are weights.
_BY_ENTRY = ("median", "trimmed-mean")
_PADDED = "bf16 rounds a text by what it is padded to, which is another's length"
# Of the learning rate times what pulls values back, which is the share of its change
# so far that a step undoes. Were it 1, a client's update would be its last step alone.
_MOST_UNDONE = 0.1


def check(config: RunConfig) -> None:
    """Raise for a run config whose keys are valid alone but not together.

    Raises
    ------
    ConfigError
        Names one key, its value, and what the other keys allow.
    """
    _check_cohort(config)
    _check_labels(config)
    _check_ranks(config)
    _check_byzantine(config)
    _check_noise(config)
    _check_folders(config)
    if config.data.is_own:
        _check_own_data(config)
    _check_rounds(config)

    phases = make_schedule(config)
    for phase in phases:
        phase.adapter_type.check(config)
    _check_open_phase(config)
    _check_rates(config, phases)
    _check_undone(config, phases)
    _check_start(config, phases)
    _check_aggregator(config, phases)
    _check_factors(config, phases)
    _check_products(config, phases)
    _check_average(config, phases)
    if config.server.robust != "none":
        _check_robust(config, phases)
    if config.privacy.is_on:
        _check_privacy(config, phases)
    if config.privacy.of_examples:
        _check_examples(config, phases)
    if config.secure.aggregation:
        _check_secure(config, phases)


def _check_cohort(config: RunConfig) -> None:
    clients = config.clients
    if 0 < clients.count < clients.per_round:
        allowed = f"1 to clients.count, which is {clients.count}"
        raise refuse("clients.per-round", clients.per_round, allowed)
    if not 1 <= clients.min_replies <= clients.per_round:
        allowed = f"1 to clients.per-round, which is {clients.per_round}"
        raise refuse("clients.min-replies", clients.min_replies, allowed)


def _check_labels(config: RunConfig) -> None:
    labels, given = config.data.labels, config.data.label_names
    is_private = config.privacy.is_on or config.privacy.of_examples
    if labels and not config.data.is_own and not is_private:
        allowed = f"empty, or data.name {OWN_DATA}, or privacy"
        raise refuse("data.labels", labels, allowed)
    if labels and len({*given}) < max(2, len(labels.split(","))):
        raise refuse("data.labels", labels, "two or more names, each once")


def _check_ranks(config: RunConfig) -> None:
    lora = config.lora
    given = [part.strip() for part in lora.ranks.split(",")]
    if lora.ranks and not all(
        # Python reads no number of thousands of digits.
        part.isdecimal() and len(part) < 20 and 1 <= int(part) <= lora.rank
        for part in given
    ):
        allowed = f"whole numbers from 1 to lora.rank, which is {lora.rank}"
        raise refuse("lora.ranks", lora.ranks, f"empty, or {allowed}, with commas")


def _check_byzantine(config: RunConfig) -> None:
    server = config.server
    if server.robust == "none" and server.byzantine:
        allowed = "0, since server.robust is none"
        raise refuse("server.byzantine", server.byzantine, allowed)


def _check_noise(config: RunConfig) -> None:
    privacy = config.privacy
    if privacy.unit == "example" and not privacy.of_examples:
        allowed = "client, since privacy.noise-multiplier and privacy.epsilon are 0"
        raise refuse("privacy.unit", privacy.unit, allowed)
    if privacy.trust == "sums" and not (privacy.is_on or privacy.of_examples):
        allowed = "server, since privacy.noise-multiplier and privacy.epsilon are 0"
        raise refuse("privacy.trust", privacy.trust, allowed)
    if privacy.trust == "sums" and not config.secure.aggregation:
        allowed = "server, since secure.aggregation is off"
        raise refuse("privacy.trust", privacy.trust, allowed)
    if privacy.participations and privacy.trust == "server":
        allowed = "0, since privacy.trust is server"
        raise refuse("privacy.participations", privacy.participations, allowed)
    if privacy.noise_multiplier and privacy.epsilon:
        allowed = "0, since privacy.noise-multiplier says how much noise"
        raise refuse("privacy.epsilon", privacy.epsilon, allowed)


def _check_folders(config: RunConfig) -> None:
    run = config.run
    # As written, since a node checks them too, and its own home is nobody's business.
    if run.resume and run.dir and Path(run.dir) != run.resumed_as_written:
        allowed = f"empty, or run.resume, which is {printable(repr(run.resume))}"
        raise refuse("run.dir", run.dir, allowed)


def _check_own_data(config: RunConfig) -> None:
    data, why = config.data, f"since data.name is {OWN_DATA}"
    for key, given, off in (
        ("attack.kind", config.attack.kind, "none"),
        ("clients.count", config.clients.count, 0),
        ("data.validation", data.validation, 0),
    ):
        if given != off:
            raise refuse(key, given, f"{off}, {why}")
    if data.train and "{}" not in data.train:
        allowed = "a path with {} for a simulated node's number, or empty"
        raise refuse("data.train", data.train, f"{allowed}, {why}")
    if not data.test and config.privacy.of_examples:
        allowed = "a file on the server, since privacy.unit is example: figures of "
        allowed += "clients' held-out texts would be exact"
        raise refuse("data.test", data.test, allowed)
    if not (data.test or config.clients.holdout):
        allowed = (
            f"above 0, {why} and data.test is empty: there would be nothing to "
            "evaluate on"
        )
        raise refuse("clients.holdout", config.clients.holdout, allowed)


def _check_rounds(config: RunConfig) -> None:
    if len(list_methods()[config.method].phases) == 1:
        return
    if config.rounds < 2:
        allowed = f"at least 2 for the two phases of {config.method}"
        raise refuse("rounds", config.rounds, allowed)
    if config.sparse.rounds >= config.rounds:
        allowed = (
            f"up to {config.rounds - 1} for {config.method}, since rounds is "
            f"{config.rounds}"
        )
        raise refuse("sparse.rounds", config.sparse.rounds, allowed)


def _check_open_phase(config: RunConfig) -> None:
    first, *others = list_methods()[config.method].phases
    can_stop = find_adapter(first.adapter).learns_delta
    if others and not config.sparse.rounds and not can_stop:
        raise refuse("sparse.rounds", 0, f"at least 1 for {config.method}")


def _check_rates(config: RunConfig, phases: Sequence[Phase]) -> None:
    train, shortest = config.train, min(phase.rounds for phase in phases)
    if any(phase.is_open for phase in phases):
        for key, given, off in (
            ("train.schedule", train.schedule, "constant"),
            ("train.warmup-rounds", train.warmup_rounds, 0),
        ):
            if given != off:
                allowed = f"{off}, since sparse.rounds is 0: no phase has a set length"
                raise refuse(key, given, allowed)
    if train.warmup_rounds >= shortest:
        most = f"0 to {shortest - 1}" if shortest > 1 else "0"
        allowed = f"{most}, fewer than the rounds of the shortest phase"
        raise refuse("train.warmup-rounds", train.warmup_rounds, allowed)


def _check_undone(config: RunConfig, phases: Sequence[Phase]) -> None:
    """Refuse a recipe whose update shows a client's last examples more than others."""
    for phase in phases:
        recipe = phase.recipe
        for key, given in (
            ("train.prox", recipe.prox),
            ("train.weight-decay", recipe.weight_decay),
        ):
            rate = max(recipe.lr, recipe.head_lr)
            if given * rate > _MOST_UNDONE:
                allowed = (
                    f"up to {_MOST_UNDONE} / {rate}, since the highest learning "
                    f"rate of the {phase.adapter} phase is {rate}"
                )
                raise refuse(key, given, allowed)


def _check_start(config: RunConfig, phases: Sequence[Phase]) -> None:
    last = phases[-1]
    if _is_low_rank(last) and last.primed and config.lora.start != "peft":
        allowed = (
            f"peft for {config.method}, whose {phases[-2].adapter} phase primes the "
            "start"
        )
        raise refuse("lora.start", config.lora.start, allowed)


def _check_aggregator(config: RunConfig, phases: Sequence[Phase]) -> None:
    lora, last = config.lora, phases[-1]
    used, default = last.aggregator, LoraConfig().aggregator
    if _is_low_rank(last) and lora.aggregator not in (default, used):
        allowed = f"{used}, which is the one of {config.method}"
        raise refuse("lora.aggregator", lora.aggregator, allowed)
    for phase in phases if lora.ranks else ():
        if not phase.aggregator_type.takes_ranks:
            able = " or ".join(_aggregators("takes_ranks"))
            allowed = f"empty, since the aggregator is {phase.aggregator}; or {able}"
            raise refuse("lora.ranks", lora.ranks, allowed)
    given_up = _given_up(config, last)
    if lora.ranks and given_up:
        # A client of a smaller rank would miss what the base gave up.
        raise refuse("lora.ranks", lora.ranks, f"empty, since {given_up}")
    changes = _is_low_rank(last) and last.aggregator_type.changes_base
    if config.train.weight_decay and changes and given_up:
        # A node that is sent a changed base whole does not know what it gave up.
        allowed = f"0, since {given_up} and the aggregator is {used}"
        raise refuse("train.weight-decay", config.train.weight_decay, allowed)
    download = config.download
    if lora.ranks and (download.dtype != "float32" or download.lossless):
        # Each rank's slices are coded by themselves, so a client's start would depend
        # on the other clients of its node.
        allowed = "empty, or download.dtype float32 without download.lossless"
        raise refuse("lora.ranks", lora.ranks, allowed)


def _given_up(config: RunConfig, last: Phase) -> str:
    """Return the setting by which the base gives up the start; empty if none does."""
    if last.primed and config.lora.base == "residual":
        return "lora.base is residual"
    return "lora.start is federa" if config.lora.start == "federa" else ""


def _check_factors(config: RunConfig, phases: Sequence[Phase]) -> None:
    rows = list_methods()[config.method].phases
    for row, phase in zip(rows, phases, strict=True):
        if phase.aggregator_type.needs_factors and not _is_low_rank(phase):
            key, given = "method", config.method
            if not row.aggregator:
                key, given = "lora.aggregator", config.lora.aggregator
            raise refuse(
                key,
                given,
                f"a low-rank adapter with aggregator {phase.aggregator}, which is "
                f"none for {phase.adapter}",
            )


def _check_products(config: RunConfig, phases: Sequence[Phase]) -> None:
    server = config.server
    for phase in phases:
        aggregator = phase.aggregator_type
        by = f"the aggregator is {phase.aggregator}"
        steps = aggregator.steps
        if steps and _is_low_rank(phase) and aggregator.trains == "both":
            by = f"server.robust is {server.robust}"
            steps = server.robust not in _BY_ENTRY
        if not steps:
            # The result is a weight, which a step towards mean factors cannot give.
            for key, given, plain in (
                ("server.optimizer", server.optimizer, "none"),
                ("server.lr", server.lr or 1.0, 1.0),
            ):
                if given != plain:
                    raise refuse(key, given, f"{plain}, since {by}")
        if aggregator.needs_float32 and config.model.dtype != "float32":
            allowed = (
                f"float32, since the aggregator {phase.aggregator} adds to the weights"
            )
            raise refuse("model.dtype", config.model.dtype, allowed)
        if aggregator.needs_float32 and config.model.quantize:
            allowed = (
                f"empty, since the aggregator {phase.aggregator} adds to the weights"
            )
            raise refuse("model.quantize", config.model.quantize, allowed)


def _check_robust(config: RunConfig, phases: Sequence[Phase]) -> None:
    server, clients = config.server, config.clients
    for phase in phases:
        if not phase.aggregator_type.is_mean:
            allowed = f"none, since the aggregator is {phase.aggregator}"
            raise refuse("server.robust", server.robust, allowed)
    if config.lora.ranks:
        allowed = "none, since lora.ranks has clients of unequal ranks"
        raise refuse("server.robust", server.robust, allowed)
    least = server.least_cohort
    for key, given in (
        ("clients.per-round", clients.per_round),
        ("clients.min-replies", clients.min_replies),
    ):
        if given < least:
            allowed = (
                f"at least {least}, since server.robust is {server.robust} and "
                f"server.byzantine is {server.byzantine}"
            )
            raise refuse(key, given, allowed)


def _check_average(config: RunConfig, phases: Sequence[Phase]) -> None:
    average = config.server.average
    if config.clients.holdout:
        for phase in phases:
            if phase.changes_base and phase.average != "none":
                allowed = (
                    "auto, none, since clients.holdout has clients evaluate, and "
                    f"rounds of {config.method} change the base, whose average is not "
                    "sent"
                )
                raise refuse("server.average", average, allowed)


def _check_privacy(config: RunConfig, phases: Sequence[Phase]) -> None:
    why = "since privacy is on"
    if not config.privacy.clip_norm:
        raise refuse("privacy.clip-norm", 0.0, f"a number above 0, {why}")
    if config.clients.count < 2:
        allowed = f"at least 2, {why} and depends on the size of the population"
        raise refuse("clients.count", config.clients.count, allowed)
    if config.clients.holdout:
        # Metrics on clients are exact functions of their data.
        raise refuse("clients.holdout", config.clients.holdout, f"0, {why}")
    for key, given, off in (
        ("lora.ranks", config.lora.ranks, ""),
        ("server.clip-norm", config.server.clip_norm, 0.0),
        ("server.robust", config.server.robust, "none"),
        # A repeated round would be one more release.
        ("run.resume", config.run.resume, ""),
    ):
        if given != off:
            raise refuse(key, given, f"{'empty' if off == '' else off}, {why}")
    rows = list_methods()[config.method].phases
    for row, phase in zip(rows, phases, strict=True):
        if not phase.aggregator_type.is_mean:
            # Its result is not a function of a noised mean.
            allowed = f"aggregator {', '.join(_aggregators('is_mean'))}, {why}"
            if row.aggregator:
                raise refuse("method", config.method, allowed)
            raise refuse("lora.aggregator", config.lora.aggregator, allowed)
    _check_delta(config)


def _check_examples(config: RunConfig, phases: Sequence[Phase]) -> None:
    """Refuse what DP-SGD on the clients does not cover."""
    privacy, why = config.privacy, "since privacy.unit is example"
    if not privacy.clip_norm:
        raise refuse("privacy.clip-norm", 0.0, f"a number above 0, {why}")
    for key, given, off, because in (
        ("clients.holdout", config.clients.holdout, 0, "metrics would be exact"),
        ("clients.weight", config.clients.weight, "examples", "tokens are not public"),
        ("train.clip-norm", config.train.clip_norm, 0, "each gradient is clipped"),
        ("privacy.trust", privacy.trust, "server", "its noise is in each update"),
        ("privacy.participations", privacy.participations, 0, "it counts trainings"),
        ("lora.ranks", config.lora.ranks, "", "noise would fill what a client lacks"),
        ("model.dtype", config.model.dtype, "float32", _PADDED),
        (
            "run.resume",
            config.run.resume,
            "",
            "clients' counts of what they have spent end with the run",
        ),
    ):
        if given != off:
            raise refuse(
                key, given, f"{'empty' if off == '' else off}, {why}: {because}"
            )
    if config.train.precision == "bf16":
        allowed = f"auto or float32, {why}: {_PADDED}"
        raise refuse("train.precision", "bf16", allowed)
    if config.model.quantize == "8bit":
        allowed = f"empty or 4bit, {why}: the texts of a batch choose columns together"
        raise refuse("model.quantize", "8bit", allowed)
    if privacy.delta > LARGEST_DELTA:
        raise refuse("privacy.delta", privacy.delta, f"up to {LARGEST_DELTA}")
    kinds = {(p.recipe.epochs, p.recipe.batch_size) for p in phases}
    if privacy.epsilon and len(kinds) > 1 and any(p.is_open for p in phases):
        allowed = f"at least 1, {why} and the phases differ in epochs or batch-size: "
        allowed += "the noise depends on their lengths"
        raise refuse("sparse.rounds", config.sparse.rounds, allowed)


def _check_secure(config: RunConfig, phases: Sequence[Phase]) -> None:
    why, clients = "since secure.aggregation is on", config.clients
    for key, given, off, because in (
        ("clients.holdout", clients.holdout, 0, "metrics would be each node's own"),
        ("lora.ranks", config.lora.ranks, "", "ranks would tell clients apart"),
        ("server.robust", config.server.robust, "none", "it compares updates"),
        ("upload.top-k", config.upload.top_k, 0, "each client would choose its own"),
        ("upload.lossless", config.upload.lossless, False, "masks have no pattern"),
    ):
        if given != off:
            allowed = str(off).lower() or "empty"
            raise refuse(key, given, f"{allowed}, {why}: {because}")
    rows = list_methods()[config.method].phases
    for row, phase in zip(rows, phases, strict=True):
        if phase.aggregator_type.fold.needs_each:
            allowed = f"one with a mean alone, {why}: {phase.aggregator} needs each "
            allowed += "client's update"
            if row.aggregator:
                raise refuse("method", config.method, allowed)
            raise refuse("lora.aggregator", config.lora.aggregator, allowed)
    for phase in phases:
        if not config.secure_bound(phase.adapter_type.section):
            allowed = f"above 0, {why} and server.clip-norm is 0"
            raise refuse("secure.clip", config.secure.clip, allowed)
    for key, given in (
        ("clients.per-round", clients.per_round),
        ("clients.min-replies", clients.min_replies),
        ("clients.min-nodes", clients.min_nodes),
    ):
        if given < 2:
            raise refuse(key, given, f"at least 2, {why}: a sum of one is no secret")
    if config.privacy.is_on:
        _check_shares(config)
        return
    levels = GRID_LEVELS[config.upload.dtype]
    most = MOST_SUM // (levels * clients.per_round)
    if not 0 < clients.max_weight <= most:
        allowed = (
            f"1 to {most}, {why}: sums of clients.per-round {clients.per_round} "
            f"updates have 32 bits, of {config.upload.dtype}'s precision"
        )
        raise refuse("clients.max-weight", clients.max_weight, allowed)


def _check_shares(config: RunConfig) -> None:
    """Check what noise of clients needs; privacy and secure sums are on."""
    privacy, clients, why = config.privacy, config.clients, "since privacy is on"
    for key, given in (
        ("secure.clip", config.secure.clip),
        ("secure.sparse-clip", config.secure.sparse_clip),
        ("secure.lora-clip", config.secure.lora_clip),
    ):
        if given:
            raise refuse(key, given, f"0, {why}: the bound is privacy.clip-norm")
    if privacy.trust != "sums":
        allowed = "sums, since secure.aggregation is on and privacy too"
        raise refuse("privacy.trust", privacy.trust, allowed)
    least = -(-config.rounds * clients.per_round // clients.count)
    if not least <= config.participations <= config.rounds:
        allowed = f"0, or {least} to {config.rounds}, since rounds is {config.rounds} "
        allowed += f"and {clients.per_round} of {clients.count} clients train in each"
        raise refuse("privacy.participations", privacy.participations, allowed)
    if config.sharers < 1:
        missing = clients.min_replies + 1 - config.sharers
        allowed = f"at least {missing}, since privacy.trust is sums and up to "
        allowed += f"secure.colluding {config.secure.colluding:g} of clients.per-round "
        allowed += f"{clients.per_round} may know their shares of the noise"
        raise refuse("clients.min-replies", clients.min_replies, allowed)


def _check_delta(config: RunConfig) -> None:
    """Refuse a delta at which a run may publish the data of one of its clients."""
    count, given = config.clients.count, config.privacy.delta
    delta = config.privacy.delta_of(count)
    if not config.privacy.allows_delta(count):
        allowed = f"above 0 up to {LARGEST_DELTA} and below {1 / count:.4g}, which is "
        allowed += f"1 / clients.count, for {count} clients"
        if not given:
            allowed += f"; 0 stands for {count} ** -1.1 = {delta:.3g}"
        raise refuse("privacy.delta", given, allowed)


def _is_low_rank(phase: Phase) -> bool:
    return bool(phase.adapter_type.is_low_rank)


def _aggregators(fact: str) -> list[str]:
    # Outside packages are not loaded just to be listed.
    return [name for name in AGGREGATORS if getattr(find_aggregator(name), fact)]
