"""Where a client's residual stays between its rounds.

It is lost without harm: the client goes on as if it had sent all.
"""

from collections.abc import Mapping

from flwr.app import Array, ArrayRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from slora_flwr.adapters.head import State
from slora_flwr.home import cache_folder, write_atomically

_RECORD = "residual"


class Residuals:
    """Residuals of one run's clients.

    A node of one client keeps it in Flower's `Context`, which ends with the run and
    never leaves the node. Clients of a simulation move between nodes: theirs are files
    in the cache, below the run's id.

    Parameters
    ----------
    context : Context
        The node's.
    is_only_client : bool
        Whether the node hosts a single client.
    """

    def __init__(self, context: Context, *, is_only_client: bool) -> None:
        self._context, self._is_only = context, is_only_client
        self._folder = cache_folder() / f"residuals-{context.run_id}"

    def take(self, client: int, tag: str) -> State:
        """Give what a client kept under this tag, nothing under another.

        Parameters
        ----------
        client : int
            Its id.
        tag : str
            Of the phase and its layout: what was kept for another has no meaning now.
        """
        data = b""
        if self._is_only:
            if _RECORD in self._context.state:
                data = self._context.state.array_records[_RECORD][_RECORD].data
        elif (path := self._folder / str(client)).is_file():
            data = path.read_bytes()
        try:
            kept = load(data) if data else {}
        except SafetensorError:
            return {}  # damaged: as good as lost
        return {n.removeprefix(tag): t for n, t in kept.items() if n.startswith(tag)}

    def keep(self, client: int, tag: str, residual: Mapping[str, Tensor]) -> None:
        """Keep a client's residual in place of what it had."""
        data = save({f"{tag}{name}": t.contiguous() for name, t in residual.items()})
        if self._is_only:
            array = Array("uint8", (len(data),), "safetensors", data)
            self._context.state[_RECORD] = ArrayRecord({_RECORD: array})
        else:
            self._folder.mkdir(exist_ok=True)
            write_atomically(self._folder / str(client), data)
