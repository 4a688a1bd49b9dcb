"""A second device for a process without one: tensors there are tensors of the CPU.

It is PyTorch's PrivateUse1, whose tensors hold real values, so that a run's figures can
be compared with the CPU's bit for bit. As with CUDA, an operation on tensors of two
devices raises, and so does reading a tensor of the device as an array.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "second"
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
# As CPUs do, so that results in bf16 are the same.
_IN_BF16 = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"),
    "scaled_dot_product_attention",
)
_LIBRARIES: list[torch.library.Library] = []  # which live as long as they are held


class SecondTensor(Tensor):
    """A tensor of the second device; `held` has its values, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> "SecondTensor":
        made: SecondTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SecondTensor({self.held!r})"

    @property  # type: ignore[override]
    def data(self) -> "SecondTensor":
        """The tensor without its gradient; it can be exchanged for another."""
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, other: "SecondTensor") -> None:
        torch._C.TensorBase.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    def tolist(self) -> list[Any]:
        """Return the values, which any device's tensors give in this way."""
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage by which libraries tell tensors that share memory."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(op, args, kwargs or {})


@torch.inference_mode(False)  # whose tensors could not be views of the device's own
@torch.no_grad()
def _compute(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operation, some of whose tensors are of the device, or its result."""
    if op is torch.ops.aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.MATH.value
    given = tree_leaves((args, kwargs))
    for value in given:
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{op}: a generator of {value.device}, not of {NAME}")
        if not isinstance(value, Tensor) or type(value) is SecondTensor:
            continue
        is_scalar = not value.dim() and torch.Tag.pointwise in op.tags
        if op not in _COPIES and not is_scalar:
            raise RuntimeError(
                f"{op}: all tensors must be on one device, but found at least two, "
                f"{NAME} and {value.device}, {tuple(value.shape)}"
            )
    devices = [value for value in given if isinstance(value, torch.device)]
    plain = tree_map_only(SecondTensor, lambda t: t.held, (args, kwargs))
    plain = tree_map_only(torch.device, lambda _: torch.device("cpu"), plain)
    found = op(*plain[0], **plain[1])
    if op is torch.ops.aten.copy_.default and type(args[0]) is not SecondTensor:
        return args[0]
    if any(device.type != NAME for device in devices):
        return found
    return return_and_correct_aliasing(
        op, args, kwargs, tree_map_only(Tensor, SecondTensor, found)
    )


class _Module(_DummyBackendModule):
    """What PyTorch asks of `torch.second`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def add_second_device() -> torch.device:
    """Add the device to this process, once, before anything is computed in it."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    # Without it, `Module.to` would untie weights, which it does not on real devices.
    torch.__future__.set_swap_module_params_on_conversion(True)
    other = torch.library.Library("_", "IMPL")
    other.fallback(
        lambda op, *args, **kwargs: _compute(op, args, kwargs), "PrivateUse1"
    )
    other.fallback(torch.library.fallthrough_kernel, _AUTOCAST)
    _device_constructors()  # which remember PyTorch's own
    torch.tensor = _tensor(torch.tensor)
    casts = torch.library.Library("aten", "IMPL")
    for name in _IN_BF16:
        casts.impl(name, _in_bf16(getattr(torch.ops.aten, name).default), _AUTOCAST)
    # Without a kernel, PyTorch differentiates it by a formula that rounds otherwise.
    backward = torch.ops.aten.silu_backward.default
    casts.impl(
        "silu_backward", lambda *args: _compute(backward, args, {}), "PrivateUse1"
    )
    _LIBRARIES.extend([other, casts])
    return torch.device(NAME, 0)


_AUTOCAST = "AutocastPrivateUse1"


def _tensor(make: Any) -> Any:
    """Return `torch.tensor`, which by itself passes by what is written in Python."""

    def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, device=device, **kwargs)
        return make(data, **kwargs).to(device)

    return tensor


def _in_bf16(op: Any) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST))

    def cast(value: Tensor) -> Tensor:
        is_single = value.dtype == torch.float32
        return value.to(torch.bfloat16) if is_single else value

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return op(*args, **kwargs)

    return compute
