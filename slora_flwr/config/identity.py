"""What server, nodes and checkpoints of a run must have in common of their code."""

from slora_flwr.common.code_digest import files_digest
from slora_flwr.common.protocol import PROTOCOL
from slora_flwr.config.schedule import outside_files
from slora_flwr.config.sections import RunConfig


def code_identity(config: RunConfig) -> dict[str, str | int]:
    """Return the protocol, and a digest of the outside packages that a run uses.

    Those packages have no protocol of their own, so that any change to them counts.
    """
    identity: dict[str, str | int] = {"protocol": PROTOCOL}
    if files := outside_files(config):
        identity["outside-code"] = files_digest(files)
    return identity
