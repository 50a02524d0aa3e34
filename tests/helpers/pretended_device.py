"""A device that is not there: its tensors lie on the CPU, but mixing them with the CPU's fails as it does on a GPU.

    with pretended_device():
        torch.ones(2, device=DEVICE) + torch.ones(2)  # RuntimeError: Expected all tensors to be on the same device

A CPU build of torch knows the device's name and initialises nothing for it. Random numbers come from the CPU's
generator, so that a run draws what it draws on the CPU. There is no autocast and no process group for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
_COPIES = {_aten.copy_, _aten._to_copy}  # cross devices
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}  # take places from the CPU
# These make tensors from Python's values below every dispatch.
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
_AT_PLACES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class PretendedTensor(torch.Tensor):
    """A tensor that says that it is on `DEVICE`, and holds its values in a CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendedTensor":
        geometry = held.shape, held.stride(), held.storage_offset()
        with torch.inference_mode(held.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(cls, *geometry, dtype=held.dtype, device=DEVICE)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:  # tied weights are recognised by its address
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _held(one: torch.Tensor) -> torch.Tensor:
    return one.held if isinstance(one, PretendedTensor) else one


def _map(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Apply a function to the tensors of an argument or a result of an operation."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(_map(function, one) for one in value) if isinstance(value, list | tuple) else value


def _require_one_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise unless a GPU would take these arguments, of which at least one is pretended."""
    if func.overloadpacket in _COPIES:
        return
    if (
        func.overloadpacket is _aten.cumsum
        and args[0].is_floating_point()
        and torch.are_deterministic_algorithms_enabled()
    ):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
    if func.overloadpacket in _INDEXED and isinstance(args[0], PretendedTensor):
        args = (args[0], None, *args[2:])

    def require(one: torch.Tensor, takes_number: bool) -> torch.Tensor:
        if isinstance(one, PretendedTensor) or (takes_number and not one.dim()):
            return one
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got some on {DEVICE} and one of shape "
            f"{tuple(one.shape)} on {one.device}."
        )

    arguments = func._schema.arguments
    written = {one.name for one in arguments if one.is_write}
    for name, value in [*zip((one.name for one in arguments), args, strict=False), *kwargs.items()]:
        # A GPU reads a number that lies on the CPU, but not from a list of tensors, and writes to none.
        takes_number = isinstance(value, torch.Tensor) and name not in written
        _map(partial(require, takes_number=takes_number), value)


def _compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Check where the arguments lie, compute on the CPU, and put the results where a GPU would put them."""
    if torch.is_inference_mode_enabled() and func._can_decompose():  # in the other modes torch has done that
        with _Dispatch():
            return func.decompose(*args, **kwargs)
    known: dict[int, torch.Tensor] = {}  # arguments by what is computed with, to find those that are changed in place

    def held(one: torch.Tensor) -> torch.Tensor:
        known[id(_held(one))] = one
        return _held(one)

    def shown(one: torch.Tensor) -> torch.Tensor:
        same = known.get(id(one))
        if same is None:
            return PretendedTensor(one) if pretended else one
        if (same.shape, same.stride()) != (one.shape, one.stride()):
            raise NotImplementedError(f"{func} changes the shape in place, which a pretended tensor cannot follow.")
        return same

    held_args, held_kwargs = _map(held, args), {name: _map(held, value) for name, value in kwargs.items()}
    pretended = any(isinstance(one, PretendedTensor) for one in known.values())
    if pretended:
        _require_one_device(func, args, kwargs)
    if kwargs.get("device") is not None:
        pretended = _is_pretended(kwargs["device"])
        held_kwargs["device"] = "cpu" if pretended else kwargs["device"]
    if pretended and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'.")
    return _map(shown, func(*held_args, **held_kwargs))


class _Dispatch(TorchDispatchMode):
    """Sees every operation, those of CPU tensors too, since `torch.ones(2, device=DEVICE)` has no other tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes tensors from Python's values on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _AT_PLACES:
            args = (args[0], _places(args[1]), *args[2:])
        if func in _FROM_DATA:
            args = tuple(_map(_held, one) if isinstance(one, list | tuple) else one for one in args)
            if _is_pretended(kwargs.get("device", args[0].device if func is torch.Tensor.new_tensor else None)):
                return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _places(index: Any) -> Any:
    """An index with tensors in place of lists."""
    if isinstance(index, tuple):
        return tuple(map(_places, index))
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _of_cpu(function: Any) -> Any:
    """A function that takes `DEVICE` in its arguments for the CPU."""

    def here(value: Any) -> Any:
        return "cpu" if isinstance(value, str | torch.device) and value in (DEVICE, DEVICE.type) else value

    return lambda *args, **kwargs: function(*map(here, args), **{name: here(value) for name, value in kwargs.items()})


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Inside the block, `DEVICE` is there, and it is Accelerate's device for runs with `use_cpu=False`."""
    # The first three refuse devices that they do not know. What is loaded to the CPU is moved by those who load it.
    names = ("autocast", "is_autocast_enabled", "get_autocast_dtype", "load")
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to` leaves tied weights tied, as on a GPU
    try:
        with (
            patch.dict("os.environ", ACCELERATE_TORCH_DEVICE=str(DEVICE)),
            patch.multiple(torch, **{name: _of_cpu(getattr(torch, name)) for name in names}),
            patch("torch.lazy", torch.cpu, create=True),  # the device's module, which torch's checkpointing asks for
            _Dispatch(),
            _Functions(),
        ):
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
        AcceleratorState._reset_state(reset_partial_state=True)
