"""Privacy of each example: how much noise a client needs, and what it has spent.

DP-SGD (Abadi et al., arXiv 1607.00133) on the client: each step is a release of its
own, of the sum of clipped gradients of the examples that it drew. A client's number of
examples is public.
"""

from collections.abc import Iterable, Mapping

from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import make_schedule
from slora_flwr.privacy.accountant import Release, calibrate, epsilon, unite

# Of the budget, by which an epsilon that was calibrated may exceed it by rounding.
_SLACK = 1e-6


class BudgetError(RuntimeError):
    """A client's training would exceed its budget, or has no guarantee."""


class ExamplePrivacy:
    """The noise and the budget of one client.

    Parameters
    ----------
    config : RunConfig
        A run with privacy of examples.
    examples : int
        The client's number of examples.

    Attributes
    ----------
    delta : float
        The delta of the guarantee.
    noise_multiplier : float
        The standard deviation of a step's noise, over the bound of a gradient's norm.

    Raises
    ------
    BudgetError
        If delta is too large for so few examples.
    """

    def __init__(self, config: RunConfig, examples: int) -> None:
        privacy = config.privacy
        self.delta = privacy.delta_of(examples) if examples else 1.0
        if not examples or not privacy.allows_delta(examples):
            raise BudgetError(
                f"privacy.delta is {self.delta:.3g} for its {examples} examples; "
                "allowed: up to 0.01 and below 1 / examples"
            )
        self._budget, schedule = privacy.epsilon, make_schedule(config)
        self._kinds = [
            (min(1.0, r.batch_size / examples), r.steps_of(examples))
            for r in (phase.recipe for phase in schedule)
        ]
        self.noise_multiplier = privacy.noise_multiplier
        if self._budget:
            rounds = [phase.rounds for phase in schedule]
            self.noise_multiplier = calibrate(
                unite(
                    Release(rate, 0.0, steps * count)
                    for (rate, steps), count in zip(self._kinds, rounds, strict=True)
                ),
                self._budget,
                self.delta,
            )

    def release(self, phase: int, trainings: int = 1) -> Release:
        """Return the release of trainings in a phase, by its index."""
        rate, steps = self._kinds[phase]
        return Release(rate, self.noise_multiplier, steps * trainings)

    def epsilon(self, trainings: Mapping[int, int]) -> float:
        """Return the epsilon of so many trainings, by the index of their phase.

        It is the budget's at most, beyond which the client does not train.
        """
        releases = (self.release(phase, count) for phase, count in trainings.items())
        spent = epsilon(releases, self.delta)
        return min(spent, self._budget) if self._budget else spent

    def spend(self, before: Iterable[Release], phase: int) -> tuple[Release, ...]:
        """Return the releases after another training in a phase.

        Raises
        ------
        BudgetError
            If they would spend more than the run's epsilon.
        """
        after = unite([*before, self.release(phase)])
        spent = epsilon(after, self.delta)
        if self._budget and spent > self._budget * (1 + _SLACK):
            raise BudgetError(
                f"it has spent its epsilon of {self._budget:g}: another training would "
                f"make it {spent:.4g}"
            )
        return after
