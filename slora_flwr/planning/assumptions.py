"""What a plan assumes of data that only nodes have: labels, nodes, examples."""

from dataclasses import dataclass, replace

from slora_flwr.config import ConfigError, PhaseRecipeConfig, RunConfig, refuse
from slora_flwr.config.schedule import make_schedule
from slora_flwr.planning.rounds import population
from slora_flwr.tasks.choice import find_task


def unchecked(config: RunConfig) -> str:
    """Return what of a run's data a plan cannot check; "" if it can check all."""
    if config.data.is_own:
        return "Not checked: what only nodes have, such as enough examples."
    if not config.clients.count:
        return "Not checked: whether the data suffice for all nodes."
    return ""


@dataclass(frozen=True)
class Assumptions:
    """Assumed figures; None where nothing is assumed.

    Attributes
    ----------
    labels : int or None
        Number of label names that the nodes' data has.
    nodes : int or None
        Number of nodes, each of which is a client.
    examples : int or None
        Number of each node's usable rows.
    """

    labels: int | None = None
    nodes: int | None = None
    examples: int | None = None

    def check(self, config: RunConfig) -> None:
        """Raise an error if a run's config contradicts the assumptions.

        Raises
        ------
        ConfigError
            The error.
        """
        data, least = config.data, config.clients.per_round
        for name, given in vars(self).items():
            if given is not None and not data.is_own:
                allowed = f"none, since data.name is {data.name!r} and not 'node'"
                raise refuse(f"--{name}", given, allowed)
        has_classes = find_task(config).has_classes
        if self.labels and not has_classes:
            raise refuse("--labels", self.labels, f"none for {config.task}")
        if data.is_own and has_classes and not (data.labels or self.labels):
            raise ConfigError(
                "data.labels is ''; allowed: the label names, separated by commas, or "
                "--labels with their assumed number: without either the head's size is "
                "unknown until nodes answer"
            )
        if self.labels and data.labels and self.labels != len(data.label_names):
            allowed = f"{len(data.label_names)}, the number of data.labels, or none"
            raise refuse("--labels", self.labels, allowed)
        if self.nodes is not None and self.nodes < least:
            allowed = f"at least clients.per-round, which is {least}"
            raise refuse("--nodes", self.nodes, allowed)

    def classes(self, config: RunConfig) -> list[str]:
        """Return the label names of nodes' data; none if the server has all data."""
        if not config.data.is_own:
            return []
        named = list(config.data.label_names)
        return named or [str(number) for number in range(self.labels or 0)]

    def clients(self, config: RunConfig) -> list[int]:
        """Return the client population."""
        return population(config) if self.nodes is None else list(range(self.nodes))

    def in_batches(self, config: RunConfig) -> RunConfig:
        """Return a config whose batches are no larger than a node's largest one."""
        if self.examples is None:
            return config
        count = self._trained(config)

        def largest(batch_size: int) -> int:
            # Training makes the batches of an epoch as equal as it can.
            return -(-count // -(-count // batch_size)) if batch_size else 0

        return replace(
            config,
            **{
                name: replace(section, batch_size=largest(section.batch_size))
                for name, section in vars(config).items()
                if name == "train" or isinstance(section, PhaseRecipeConfig)
            },
        )

    def tell(self, config: RunConfig) -> str:
        """Return what is assumed, and the training steps that follow; "" if nothing."""
        told = [
            f"{given:,} {name if given > 1 else name[:-1]}"
            for name, given in vars(self).items()
            if given is not None
        ]
        if not told:
            return ""
        if self.examples is None:
            return f"Assumed: {', '.join(told)}."
        count = self._trained(config)
        steps = ", ".join(
            f"{phase.adapter} {phase.recipe.steps_of(count):,}"
            for phase in make_schedule(config)
        )
        return (
            f"Assumed: {', '.join(told)} of each node. "
            f"A client's steps in a round: {steps}."
        )

    def _trained(self, config: RunConfig) -> int:
        """Return how many examples a node trains on."""
        count = self.examples or 0
        return max(1, count - round(count * config.clients.holdout))
