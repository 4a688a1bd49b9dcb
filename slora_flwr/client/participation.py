"""In how many rounds a node's clients have trained, where noise is for so many."""

from typing import cast

from flwr.app import ConfigRecord, Context

from slora_flwr.config import RunConfig
from slora_flwr.training.trainer import ClientError

_RECORD = "participations"


def take_part(
    context: Context, config: RunConfig, client: int, server_round: int
) -> None:
    """Count a round of a client, if its noise is for no more of them.

    A round that is tried again counts once, since at most one of its sums is opened.

    Raises
    ------
    ClientError
        If it has taken part in as many as `privacy.participations` allows.
    """
    if not config.shares_noise:
        return
    record = context.state.config_records.setdefault(_RECORD, ConfigRecord())
    done, last = cast(list[int], record.get(str(client), [0, 0]))
    if server_round == last:
        return
    most = config.participations
    if done >= most:
        raise ClientError(
            f"it took part in {done} rounds; allowed: up to {most}, for which the "
            "noise of this run's clients is"
        )
    record[str(client)] = [done + 1, server_round]
