"""The coding of clients' updates, with their residuals added."""

from flwr.app import Context
from numpy.random import Philox

from slora_flwr.aggregation.ring_sum import grid_of
from slora_flwr.client.residuals import Residuals
from slora_flwr.common.random import key
from slora_flwr.common.tensors import State
from slora_flwr.config import parse
from slora_flwr.training.trainer import Trainer
from slora_flwr.wire.codec import Codec
from slora_flwr.wire.grid import Grid
from slora_flwr.wire.messages import Instruction
from slora_flwr.wire.state_channel import Upload, write_update


class Sender:
    """Code the updates that an instruction asks for.

    Parameters
    ----------
    trainer : Trainer
        The node's trainer, with the phase's adapter attached.
    context : Context
        The node's context.
    instruction : Instruction
        The round's instruction.
    """

    def __init__(
        self, trainer: Trainer, context: Context, instruction: Instruction
    ) -> None:
        self._trainer, self._instruction = trainer, instruction
        config, phase = trainer.config, trainer.schedule[instruction.phase]
        self._codec: Codec | Grid = Codec.of_upload(
            config.upload,
            phase.adapter_type.is_selection,
            trainer.model.backbone.head_size,
        )
        self._rank_of = phase.adapter_type.client_ranks(config)
        self._clip_norm = config.server.clip_norm
        if config.privacy.is_on:
            self._clip_norm = config.privacy.bound(phase.adapter_type.section)
        if config.secure.aggregation:
            section = phase.adapter_type.section
            self._codec = grid_of(config, section, trainer.model.adapter.returned())
            self._clip_norm = config.secure_bound(section)
        self._remembers = config.upload.feedback and not self._codec.is_exact
        self._before: State = {}
        # Residuals of a redrawn mask, or of refactored factors, do not apply to the
        # next round.
        self._has_head_alone = phase.renews
        layout = "head" if self._has_head_alone else instruction.fingerprint
        self._tag = f"{instruction.phase} {layout} "
        is_only_client = parse(context.run_config).clients.count == 0
        self._residuals = Residuals(
            context,
            instruction.lineage,
            config.run.keep,
            is_only_client=is_only_client,
        )
        self._rounds = dict(
            zip(instruction.clients, instruction.residuals, strict=False)
        )

    def code(self, client: int, update: State, start: State) -> Upload:
        """Code a client's update; `start` is the state that it started from."""
        config = self._trainer.config
        if self._remembers:
            since = self._since(client)
            self._before = self._residuals.take(client, self._tag, since)
        return write_update(
            update,
            self._codec,
            residual=self._before,
            start=self._trainer.model.adapter.whole(start),
            importance=config.upload.importance,
            stream=self._stream(client),
            clip_norm=self._clip_norm,
            rank=self._rank_of(client) if self._rank_of else None,
            keeps_lost=self._remembers,
        )

    def keep(self, client: int, upload: Upload) -> None:
        """Store what the coding of an upload left out, for the client's next one."""
        if self._remembers:
            # An idle factor keeps its residual.
            residual = self._before | upload.residual
            if self._has_head_alone:
                head = self._trainer.model.backbone.head
                residual = {n: t for n, t in residual.items() if n in head}
            number = self._instruction.server_round
            since = self._since(client)
            self._residuals.keep(client, self._tag, number, since, residual)

    def _since(self, client: int) -> int:
        """Return a client's last round that counted."""
        return self._rounds.get(client, self._instruction.server_round - 1)

    def _stream(self, client: int) -> Philox:
        round_ = self._instruction.server_round
        return Philox(key=key("upload", self._trainer.config.seed, round_, client))
