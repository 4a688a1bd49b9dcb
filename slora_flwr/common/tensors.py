"""Named tensors in a stable order, and files that hold them."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, facts: Mapping[str, str]
) -> None:
    """Write a safetensors file whose bytes depend on its content alone.

    safetensors orders the metadata at random. The facts are sorted in place, since
    their order does not change the header's length.
    """
    save_file(dict(tensors), path, dict(facts))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        file.seek(8)
        file.write(text.encode().ljust(length))
