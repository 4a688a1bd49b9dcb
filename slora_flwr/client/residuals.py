"""Storage of clients' residuals between their rounds.

Losing a residual is harmless; the client continues without that correction.
"""

from collections.abc import Mapping
from logging import WARNING

from flwr.app import Array, ArrayRecord, Context
from flwr.common.logger import log
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slora_flwr.common.files import (
    make_folder,
    run_folder,
    write_atomically,
)
from slora_flwr.common.tensors import State

RECORD = "residual"


class Residuals:
    """Residuals of one run's clients.

    A node with one client keeps its residual in Flower's `Context`, which ends with the
    run and never leaves the node. Simulated clients move between nodes, so their
    residuals are files in the run's folder, one per round. A repeated
    round, even after an interruption, starts from the same residuals.

    Parameters
    ----------
    context : Context
        The node's context.
    lineage : int
        Names the run, see `Instruction`.
    keep : int
        Number of rounds that a resumed run may go back.
    is_only_client : bool
        Whether the node hosts a single client.
    """

    def __init__(
        self, context: Context, lineage: int, keep: int, *, is_only_client: bool
    ) -> None:
        self._context, self._is_only = context, is_only_client
        self._folder = run_folder(lineage)
        self._keep = keep

    def take(self, client: int, tag: str, server_round: int) -> State:
        """Return a client's residual of a round if its tag matches, else nothing.

        Parameters
        ----------
        client : int
            The client's id.
        tag : str
            Names the phase and its layout; other layouts' residuals do not apply.
        server_round : int
            The round. A `Context` holds the latest residual, of that round or before.
        """
        data = b""
        if self._is_only:
            records = self._context.state.array_records
            for number, array in records.get(RECORD, {}).items():
                data = array.data if int(number) <= server_round else b""
        elif (path := self._folder / f"{client}" / f"{server_round}").is_file():
            data = path.read_bytes()
        try:
            kept = load(data) if data else {}
        except SafetensorError:
            return {}  # damaged, so treated as lost
        return {n.removeprefix(tag): t for n, t in kept.items() if n.startswith(tag)}

    def keep(
        self,
        client: int,
        tag: str,
        server_round: int,
        since: int,
        residual: Mapping[str, Tensor],
    ) -> None:
        """Store a client's residual of a round, and delete those no longer needed.

        Parameters
        ----------
        client : int
            The client's id.
        tag : str
            See `take`.
        server_round : int
            The round.
        since : int
            The client's last round that counted, 0 for none. Residuals of rounds in
            between are no longer needed.
        residual : Mapping[str, Tensor]
            What the coding of its update left out.
        """
        data = save({f"{tag}{name}": t.contiguous() for name, t in residual.items()})
        if self._is_only:
            array = Array("uint8", (len(data),), "safetensors", data)
            self._context.state[RECORD] = ArrayRecord({f"{server_round}": array})
            return
        folder = self._folder / f"{client}"
        try:
            make_folder(folder)
            write_atomically(folder / f"{server_round}", data)
        except OSError as error:
            log(WARNING, "client %d continues without its residual: %s", client, error)
            return
        rounds = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
        # A run resumes after this round less `keep`, at the earliest.
        last = min(since, server_round - self._keep)
        old = [number for number in rounds if number <= last]
        lost = [number for number in rounds if since < number < server_round]
        for number in old[:-1] + lost:
            (folder / f"{number}").unlink(missing_ok=True)
