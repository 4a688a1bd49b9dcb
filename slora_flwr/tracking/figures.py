"""The figures of a round, by the names that they have in all trackers."""

from slora_flwr.config import RunConfig
from slora_flwr.config.schedule import make_schedule
from slora_flwr.runs.events import RecordedRound
from slora_flwr.runs.ledger import Ledger

DIRECTIONS = ("up", "down")


def is_private(config: RunConfig) -> bool:
    """Return whether privacy limits what may leave the server."""
    return config.privacy.is_on or config.privacy.of_examples


def figures_of(
    done: RecordedRound, ledger: Ledger, config: RunConfig
) -> dict[str, float]:
    """Return the figures of a round; see docs/guides/tracking.md for their names.

    With privacy they are what `slora_flwr.runs.release` allows: counts, losses, bytes
    and seconds of clients depend on who was drawn.

    Parameters
    ----------
    done : RecordedRound
        The round.
    ledger : Ledger
        The run's bytes, at least up to the round.
    config : RunConfig
        The run.
    """
    adapters = [phase.adapter for phase in make_schedule(config)]
    figures: dict[str, float] = {"phase": 1 + adapters.index(done.phase)}
    private = is_private(config)
    figures |= {
        f"eval/{name}": value
        for name, value in done.metrics.items()
        # No private run has clients' own evaluations, nor may hand them out.
        if not (private and "client_" in name)
    }
    known = {"kept_energy": done.kept_energy, "epsilon": done.epsilon}
    if not private:
        known |= {
            "train/loss": done.train_loss,
            "clients/asked": len(done.cohort),
            "clients/replied": done.replied,
            "seconds": done.seconds,
        }
        for direction in DIRECTIONS:
            so_far = [
                entry
                for entry in ledger.entries
                if entry.direction == direction and entry.round <= done.round
            ]
            known[f"bytes/{direction}"] = sum(e.payload_bytes for e in so_far)
            known[f"messages/{direction}"] = sum(e.message_bytes for e in so_far)
    return figures | {n: float(x) for n, x in known.items() if x is not None}
