"""The backbone: a pretrained transformer W_0, resident in a process."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slora_flwr.backbone.attention import replace_attention
from slora_flwr.backbone.dropout import replace_dropout
from slora_flwr.backbone.families import to_linear
from slora_flwr.backbone.first_token import cut_last_block
from slora_flwr.backbone.gguf import (
    gguf_source,
    is_gguf,
    load_dequantised,
    public_folder,
)
from slora_flwr.backbone.quantised import (
    is_quantised,
    packed_bytes,
    quantise,
    scales_of,
    stock_config,
)
from slora_flwr.backbone.remade import mark_outputs
from slora_flwr.common.files import expand
from slora_flwr.common.text import printable, redact, redact_hub_logs
from slora_flwr.config import EMBEDDED_MODELS, ConfigError, ModelConfig
from slora_flwr.tasks.base import Task
from slora_flwr.tasks.classification import Classification

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Backbone:
    """A frozen pretrained model with its head and target matrices.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        A sequence classifier or a causal language model; all of its parameters are
        frozen.
    tokenizer : transformers.PreTrainedTokenizerFast
        The model's tokeniser.
    targets : dict[str, nn.Linear]
        The target matrices by module name, in the model's order.
    head : dict[str, nn.Parameter]
        The task's output layers, and any other weights missing from the checkpoint.
        Empty for a language model.
    task : Task
        What the model is for.
    quantize : str
        The bits in which the blocks' linear layers are held, as in `ModelConfig`.
    quantization : dict[str, Any]
        The `quantization_config` by which transformers makes the same packed layers;
        empty if none are packed.
    outline : FakeTensorMode or None
        Set if the weights have shapes and types alone, see `outline_backbone`. None of
        them are packed then.
    size, head_size : int
        Number of weights, including the head's; number of the head's weights.
    """

    model: Any
    tokenizer: Any
    targets: dict[str, nn.Linear]
    head: dict[str, nn.Parameter]
    task: Task = field(default_factory=Classification)
    quantize: str = ""
    quantization: dict[str, Any] = field(default_factory=dict)
    outline: FakeTensorMode | None = None
    size: int = field(init=False)
    head_size: int = field(init=False)

    def __post_init__(self) -> None:
        linear = find_targets(self.model).values() if self.quantize else ()
        packed = [module for module in linear if is_quantised(module)]
        self.size = sum(parameter.numel() for parameter in self.model.parameters())
        self.size += sum(_entries(m) - m.weight.numel() for m in packed)
        self.head_size = sum(parameter.numel() for parameter in self.head.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the body's weights are held; the head is float32."""
        found: torch.dtype = self.model.base_model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.model.parameters()).device

    def computing(self) -> AbstractContextManager[object]:
        """Return the context of computations with the weights."""
        return nullcontext() if self.outline is None else self.outline

    @property
    def target_size(self) -> int:
        """Number of weights in all target matrices."""
        return sum(map(_entries, self.targets.values()))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, those of an outline as they would be held."""
        found = {id(p): p.numel() * p.element_size() for p in self.model.parameters()}
        if self.quantize:
            for module in find_targets(self.model).values():
                found[id(module.weight)] = packed_bytes(module, self.quantize)
        return sum(found.values())

    @cached_property
    def digest(self) -> str:
        """BLAKE2b digest of W_0 without the head, as loaded; 32 hex digits.

        No adapter may be attached when it is first read.
        """
        found = {n: p for n, p in self.model.named_parameters() if n not in self.head}
        for name, module in find_targets(self.model).items():
            if is_quantised(module):
                found[f"{name}.{self.quantize}"] = scales_of(module)
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in found.items():
            digest.update(f"{name}\x1f{tuple(tensor.shape)}\x1f".encode())
            raw = tensor.detach().cpu().contiguous().view(torch.uint8)
            digest.update(memoryview(raw.numpy()).cast("B"))
        return digest.hexdigest()


def _entries(module: nn.Linear) -> int:
    """Return the number of a layer's weights, packed or not."""
    return module.out_features * module.in_features


@cache
def digest_of(config: ModelConfig, task: Task) -> str:
    """Return W_0's digest, for use before the number of classes is known."""
    return load_backbone(config, task.outputs([""]), seed=0).digest


def best_device() -> torch.device:
    """Return the first available device out of CUDA, Apple's MPS and the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_tokenizer(config: ModelConfig) -> Any:
    """Load a backbone's tokeniser, a `transformers.PreTrainedTokenizerFast`.

    Raises
    ------
    ConfigError
        If there is no such model, or it has no usable tokeniser.
    """
    # Imported here, since it takes seconds and a node may not get this far.
    from transformers import AutoTokenizer

    _quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            trust_remote_code=False,  # left out, transformers would ask on a terminal
            **_source(config),
        )
    except (OSError, ValueError) as error:
        # From None, since a traceback would show what is redacted in the message.
        raise _not_found(config, error) from None
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        # Without tokenizer files, transformers makes one that has only special tokens.
        raise ConfigError(
            f"model.name is {config.name!r}, which has no tokenizer files: all text "
            "would become unknown words"
        )
    if not tokenizer("a text", add_special_tokens=False)["input_ids"]:
        raise ConfigError(
            f"model.name is {config.name!r}, whose tokenizer, as transformers loads it "
            f"({type(tokenizer).__name__}), makes no tokens of text; allowed: a model "
            "with the tokenizer of its family"
        )
    if tokenizer.pad_token_id is None:
        # As is usual for decoders. The attention mask hides padding, and a decoder
        # reads its class at the last other token.
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model.name is {config.name!r}, whose tokenizer has no padding token; "
            "allowed: a model whose tokenizer has one, or has an end token"
        )
    return tokenizer


def load_backbone(
    config: ModelConfig,
    outputs: int | None,
    seed: int,
    targets: str = "all-linear",
    tokenizer: Any = None,
    task: Task | None = None,
) -> Backbone:
    """Load a backbone: a classifier with a fresh head, or a language model.

    Parameters
    ----------
    config : ModelConfig
        The model's name, revision and dtype.
    outputs : int or None
        Number of classes; None for a language model, which needs no head.
    seed : int
        Seed of the weights missing from the checkpoint, which are the head's.
    targets : str
        `all-linear`, or comma-separated endings of module names.
    tokenizer : transformers.PreTrainedTokenizerFast or None
        The model's tokeniser; None to load it.
    task : Task or None
        What the model is for; None for classification.

    Raises
    ------
    ConfigError
        If there is no such model, or it has no such target matrices.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(config)
    _quiet_transformers()
    described, family = describe(config, outputs), _family(outputs)
    load = partial(family.from_pretrained, config=described, trust_remote_code=False)
    if is_gguf(config.name):
        load = partial(load_dequantised, family, described)
    torch.manual_seed(seed)
    try:
        model, info = load(
            dtype=_DTYPES[config.dtype],
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,  # a pickled checkpoint could run code
            **_source(config),
        )
    except (OSError, ValueError) as error:
        raise _not_found(config, error) from None
    # The key of a size mismatch is (name, found shape, expected shape).
    fresh = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    if outputs is None and fresh:
        allowed = "a language model's, such as embedded-llama, with all its weights"
        raise _refuse(config, "checkpoint", f"without {min(fresh)}", allowed)
    device = best_device()
    if not config.quantize:
        model.to(device)  # packed weights get there one by one
    return _prepare(model, config, outputs, fresh, targets, tokenizer, task, device)


def outline_backbone(
    config: ModelConfig,
    outputs: int | None,
    targets: str = "all-linear",
    tokenizer: Any = None,
    task: Task | None = None,
) -> Backbone:
    """Return a backbone of shapes and types, from config.json and the tokeniser alone.

    No weights are looked for, and none take memory: its tensors are PyTorch's fake
    ones, which compute shapes as the CPU would. Weights inside the body that the
    checkpoint may lack count as its own, not the head's.

    Parameters and errors are those of `load_backbone`.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(config)
    _quiet_transformers()
    described = describe(config, outputs)
    outline = FakeTensorMode(allow_non_fake_inputs=True)
    # Not by weak references: PyTorch moves no modules that have any.
    outline.fake_tensor_converter.meta_converter.tensor_memo = {}  # type: ignore[assignment]
    with outline:
        try:
            model = _family(outputs).from_config(described, dtype=_DTYPES[config.dtype])
        except (ValueError, AttributeError) as error:
            raise _not_found(config, error) from None
        found = _prepare(model, config, outputs, set(), targets, tokenizer, task)
    return replace(found, outline=outline)


def has_weights(config: ModelConfig) -> bool:
    """Return whether a model's folder holds weights; True for a Hub id."""
    place = Path(locate(config.name))
    return not place.is_dir() or any(place.glob("*.safetensors"))


def _family(outputs: int | None) -> Any:
    # Imported here, since it takes seconds and a node may not get this far.
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if outputs is None:
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification


def _prepare(
    model: Any,
    config: ModelConfig,
    outputs: int | None,
    fresh: set[str],
    targets: str,
    tokenizer: Any,
    task: Task | None,
    device: torch.device | None = None,
) -> Backbone:
    """Return the backbone of a model, with the named weights fresh.

    Weights are packed for a device, without which they stay as they are.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    # Exports name it. They must not name a folder of this machine.
    model.name_or_path = model.config.name_or_path = public_name(config.name)
    to_linear(model)
    model.requires_grad_(False)
    quantization: dict[str, Any] = {}
    if config.quantize and device is not None:
        quantise(model, find_targets(model), config.quantize, device)
        model.to(device)
        quantization = stock_config(model, config.quantize)
    body = f"{model.base_model_prefix}."
    head = {
        name: parameter
        for name, parameter in model.named_parameters()
        if outputs is not None and (name in fresh or not name.startswith(body))
    }
    # An output layer in half precision would round away small updates.
    for parameter in head.values():
        parameter.data = parameter.data.float()
    mark_outputs(model)
    replace_dropout(model)
    replace_attention(model)
    if outputs is not None:
        cut_last_block(model, tokenizer.pad_token_id, check=device is not None)
    found = find_targets(model, targets)
    return Backbone(
        model,
        tokenizer,
        found,
        head,
        task or Classification(),
        config.quantize,
        quantization,
    )


def describe(config: ModelConfig, outputs: int | None) -> Any:
    """Return what a model's config.json says, a `transformers.PreTrainedConfig`.

    Raises
    ------
    ConfigError
        If there is no such model, or to load it would run the code of others or read
        files outside it.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file, find_adapter_config_file

    source = _source(config)
    place, revision = source["pretrained_model_name_or_path"], config.revision or None
    labels: dict[str, Any] = {} if outputs is None else {"num_labels": outputs}
    try:
        described = AutoConfig.from_pretrained(
            trust_remote_code=False, **labels, **source
        )
        adapter = find_adapter_config_file(place, revision=revision)
        index = cached_file(
            place,
            "model.safetensors.index.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        read = json.loads(Path(index).read_text(encoding="utf-8")) if index else {}
        shards = [*read.get("weight_map", {}).values()]
    except (OSError, ValueError, AttributeError) as error:
        raise _not_found(config, error) from None
    for part in _parts(described):
        _check_code(config, part)
    if adapter is not None:
        # Its base would be loaded from wherever it says.
        raise _refuse(config, "adapter_config.json", "there", "a model without one")
    for shard in map(str, shards):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            allowed = "names of files in its folder"
            raise _refuse(config, "model.safetensors.index.json", shard, allowed)
    return described


def _parts(described: Any) -> Iterator[Any]:
    """Yield a model's config and all configs within it."""
    from transformers import PreTrainedConfig

    yield described
    for value in vars(described).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _check_code(config: ModelConfig, part: Any) -> None:
    """Raise ConfigError if a model's config names code beside the model's own."""
    from transformers import AttentionInterface

    # OWNER/NAME would be code from the Hub.
    attention = part._attn_implementation
    known = ["eager", *AttentionInterface().valid_keys()]
    if attention is not None and attention not in known:
        allowed = f"none, {', '.join(known)}"
        raise _refuse(config, "attn_implementation", attention, allowed)
    # They name a library, or a file, that would be loaded in place of the usual one.
    for key in ("quantization_config", "transformers_weights"):
        if (given := getattr(part, key, None)) is not None:
            raise _refuse(config, key, given, "none")


def _refuse(config: ModelConfig, key: str, given: object, allowed: str) -> ConfigError:
    return ConfigError(
        f"model.name is {config.name!r}, whose {key} is {printable(given)}; allowed: "
        f"{allowed}"
    )


def _quiet_transformers() -> None:
    """Silence transformers: its report on a fresh head would hide the run's log."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    redact_hub_logs()


def _source(config: ModelConfig) -> dict[str, str]:
    """Return the arguments by which transformers finds a model."""
    if is_gguf(config.name):
        return gguf_source(config.name)
    source = {"pretrained_model_name_or_path": locate(config.name)}
    return source | ({"revision": config.revision} if config.revision else {})


def _not_found(config: ModelConfig, error: Exception) -> ConfigError:
    own = ", ".join(EMBEDDED_MODELS)
    return ConfigError(
        f"model.name is {config.name!r}; allowed: {own}, a folder with config.json, "
        "model.safetensors and tokenizer.json, a .gguf file, a name below "
        f"$SLORA_ASSETS/models, or a Hub id that can be reached ({redact(error)})"
    )


def locate(name: str) -> str:
    """Return the folder or Hub id from which transformers loads `model.name`."""
    if name in EMBEDDED_MODELS:
        try:
            import slora_embedded
        except ImportError as error:
            raise ConfigError(
                f"model.name is {name!r}, and this environment lacks the package "
                "slora_embedded that holds its weights: install slora-flwr here"
            ) from error
        return str(slora_embedded.folder(name))
    assets = os.environ.get("SLORA_ASSETS")
    if assets and (Path(assets, "models", name) / "config.json").is_file():
        return str(Path(assets, "models", name))
    return str(expand(name)) if expand(name).is_dir() else name


def public_name(name: str) -> str:
    """Return how exports call `model.name`: a Hub id as it is, a folder `./NAME`.

    The latter is no Hub id, so no other model is loaded in the folder's place.
    """
    if is_gguf(name):
        return public_folder(name)
    place = locate(name)
    if name in EMBEDDED_MODELS or not Path(place).is_dir():
        return f"./{name}" if name in EMBEDDED_MODELS else name
    return f"./{Path(place).absolute().name}"


def block_modules(model: Any) -> dict[str, nn.Module]:
    """Return all modules inside the transformer blocks by their names in the model.

    Blocks are the members of the body's `ModuleList`s. Poolers, projections of
    embeddings and the head are not among them.
    """
    body = model.base_model
    lists = [n for n, m in body.named_modules() if isinstance(m, nn.ModuleList)]
    return {
        f"{model.base_model_prefix}.{name}": module
        for name, module in body.named_modules()
        if any(name.startswith(f"{block}.") for block in lists)
    }


def find_blocks(model: Any) -> list[nn.Module]:
    """Return the transformer blocks: members of the body's outermost `ModuleList`s."""
    found: list[nn.Module] = []
    inside: list[str] = []
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            found += module
    return found


def find_targets(model: Any, targets: str = "all-linear") -> dict[str, nn.Linear]:
    """Return the target matrices: linear layers inside the transformer blocks.

    Raises
    ------
    ConfigError
        If an ending matches no linear layer of the blocks.
    """
    linear = {
        name: module
        for name, module in block_modules(model).items()
        if isinstance(module, nn.Linear)
    }
    if targets == "all-linear":
        return linear
    ends = [part.strip() for part in targets.split(",")]
    found = {
        name: module
        for name, module in linear.items()
        if any(name == end or name.endswith(f".{end}") for end in ends)
    }
    for end in ends:
        if not any(name == end or name.endswith(f".{end}") for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"lora.targets is {targets!r}, and no linear layer of the blocks ends "
                f"in {end!r}; allowed: all-linear, or ends of names such as "
                f"{', '.join(known)}"
            )
    return found
