"""A GPU for tests of machines without one: tensors that are on another device, with right values.

A `PretendTensor` says that it is on the device `meta`, and keeps its values in a CPU tensor. Under
`PretendGpu`, an operation that a CUDA device would refuse raises `DeviceMismatch`, and what would
let the program wait for the device is noted as a `Wait`. So a test sees that all of a computation
takes place on one device, how often it waits, and that its numbers are those of the CPU.

It is stricter than a GPU where that finds faults: what a copy without waiting brings back is not
there until the program has waited, and memory that is not pinned makes every copy wait. Where torch
allows TF32 in matrix products, it rounds the factors of products and convolutions. It has no
autocast, no streams and no limit to its memory.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self

import pytest
import torch
import torch.__future__
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta", 0)  # of the devices that torch knows, one that needs no driver
aten = torch.ops.aten

COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip
# Results whose size is only known once the device has computed it, or that are checked for errors.
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.nonzero_numpy.default,
    aten.equal.default, aten.is_nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_consecutive.default, aten.unique_dim.default, aten.bincount.default,
    aten._linalg_eigh.default, aten._linalg_svd.default, aten._linalg_eigvals.default,
    aten.linalg_eig.default, aten._linalg_check_errors.default, aten.linalg_lstsq.default,
}  # fmt: skip
# Products whose factors CUDA rounds to TF32 where it is allowed; what is added is rounded here too.
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.convolution.default, aten.convolution_backward.default,
}  # fmt: skip
# What takes no CPU number beside tensors of the device, though arithmetic does.
NO_SCALARS = {aten.cat.default, aten.stack.default}
PRODUCT = "influence_jobs"

Kind = Literal["read", "download", "upload"]


class DeviceMismatch(BaseException):
    """A CPU tensor meets one of the device, which CUDA refuses.

    CUDA's is a RuntimeError, for which the program may take another way; this one it cannot catch.
    """


@dataclass(frozen=True)
class Wait:
    """A moment at which the program waits for the device.

    Attributes:
        kind: A number that the program reads; a copy from the device; a copy to it.
        operation: Of torch.
        stack: The lines of this project that led there, the innermost first.
    """

    kind: Kind
    operation: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.kind} ({self.operation}) at {' < '.join(self.stack[:4]) or 'no line of ours'}"
        )


class PretendTensor(Tensor):
    """A tensor of the pretended device.

    Attributes:
        held: Its values, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        made.held = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _running().dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"

    def tolist(self) -> Any:
        _running().note("read", "tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the pretended GPU to numpy: copy it first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.held.data_ptr()  # other libraries tell parameters apart by it

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        _running().note("download", "pickle")
        return self.held.__reduce_ex__(protocol)  # files are read to the CPU


class PretendGpu(TorchDispatchMode):
    """The device, and what the program does with it.

    Args:
        patch: Undone when the test ends.

    Attributes:
        device: Where `tensor.to(device)` goes.
        waits: Those so far.
    """

    device = DEVICE

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._coming: list[tuple[Tensor, Tensor]] = []  # copies that were begun, and their values
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that no other gets it
        self._patch = patch

    def __enter__(self) -> Self:
        global _GPU
        super().__enter__()
        if _GPU is None:
            _GPU = self
            self._adapt_torch()
        return self

    def __exit__(self, *error: object) -> None:
        global _GPU
        super().__exit__(*error)
        if threading.current_thread() is threading.main_thread():
            _GPU = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[Wait]]:
        """The waits within a block."""
        before = len(self.waits)
        found: list[Wait] = []
        yield found
        found += self.waits[before:]

    def note(self, kind: Kind, operation: str) -> None:
        """Note a wait, at which all that was begun ends."""
        self.waits.append(Wait(kind, operation, tuple(_ours(sys._getframe(1)))))
        for copy, values in self._coming:
            copy.copy_(values)
        self._coming.clear()

    def synchronize(self, device: Any = None) -> None:
        """In place of torch's own: wait until all that was begun has ended."""
        if self._coming:
            self.note("download", "synchronize")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation on the values."""
        if func is aten._efficientzerotensor.default:
            func = aten.zeros.default  # forward mode makes them; they have no memory
        if func is aten._fused_sdp_choice.default:
            return 0  # attention by products: the other ways are for a device each
        if func is aten._pin_memory.default:
            found: Tensor = args[0].clone()
            self._pinned[found.untyped_storage().data_ptr()] = found
            return found
        leaves = [*_tensors(args), *_tensors(kwargs.values())]
        ours = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
        if ours:
            self._refuse_mixtures(func, args, leaves)
            if func in READS or (func in INDEXED and _by_mask(args[1])):
                self.note("read", str(func))
        device = kwargs.get("device")
        here = bool(ours) if device is None else torch.device(device) == DEVICE
        if func in COPIES:
            here = self._copied(func, args, kwargs, here)
        if device is not None and torch.device(device) == DEVICE:
            kwargs = {**kwargs, "device": "cpu"}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        rounds = ours and func in PRODUCTS and torch.backends.cuda.matmul.allow_tf32
        held = _factor if rounds else _value
        result = func(
            *(_mapped(held, arg) for arg in args),
            **{name: _mapped(held, arg) for name, arg in kwargs.items()},
        )
        if func is aten._to_copy.default and ours and not here and kwargs.get("non_blocking"):
            return self._begun(result)
        given = {id(leaf.held): leaf for leaf in ours} if func._schema.is_mutable else {}
        if given and torch.Tag.inplace_view in func.tags:
            with torch._C._DisableTorchDispatch():  # the shape that the tensor itself tells
                func(*args, **kwargs)
        for leaf in given.values():
            if leaf.held.shape != leaf.shape:
                raise NotImplementedError(f"{func} changes a shape in place")

        def wrapped(found: Tensor) -> Tensor:
            if id(found) in given:
                return given[id(found)]
            return PretendTensor(found) if here and not isinstance(found, PretendTensor) else found

        return _mapped(wrapped, result)

    def _refuse_mixtures(self, func: Any, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
        if func in COPIES:
            return
        if func in INDEXED and isinstance(args[0], PretendTensor):
            indices = [one for one in args[1] if one is not None]
            if any(not isinstance(one, PretendTensor) for one in indices):
                self.note("upload", f"{func} with indices of the CPU")
            leaves = [args[0], *(leaf for leaf in args[2:3] if isinstance(leaf, Tensor))]
        cpu = [leaf for leaf in leaves if not isinstance(leaf, PretendTensor)]
        if any(leaf.ndim > 0 or func in NO_SCALARS for leaf in cpu):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in cpu)
            raise DeviceMismatch(
                f"{func}: expected all tensors to be on the same device, but {shapes} on the CPU"
            )

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], here: bool) -> bool:
        """Note what a copy lets wait; whether its result is on the device."""
        source = args[0]
        begun = bool(kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            source, here = args[1], isinstance(args[0], PretendTensor)
            begun = args[2] if len(args) > 2 else begun
        there = isinstance(source, PretendTensor)
        if here and not there and source.numel():
            pinned = source.untyped_storage().data_ptr() in self._pinned
            if not (begun and pinned):
                self.note("upload", str(func) if pinned else f"{func} from memory not pinned")
        shapes_only = torch.device(kwargs.get("device") or "cpu") == torch.device("meta")
        comes_later = begun and func is aten._to_copy.default
        if there and not here and not shapes_only and not comes_later:
            self.note("download", str(func))
        return here

    def _begun(self, values: Tensor) -> Tensor:
        """What a copy that does not wait gives: anything, until the program waits."""
        poison = float("nan") if values.is_floating_point() else 1
        copy = torch.full_like(values, poison)
        self._coming.append((copy, values))
        return copy

    def _adapt_torch(self) -> None:
        """Let torch's ways to a device lead here."""
        patch = self._patch
        autocast = torch.autocast.__init__

        @wraps(autocast)
        def cast(own: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            autocast(own, "cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

        patch.setattr(torch.autocast, "__init__", cast)
        patch.setattr(torch.accelerator, "synchronize", self.synchronize)
        apply = torch.nn.Module._apply

        @wraps(apply)
        def moved(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
            # A model that moves keeps its parameters, and with them the weights that are shared.
            with pytest.MonkeyPatch.context() as here:
                here.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
                return apply(module, *args, **kwargs)

        patch.setattr(torch.nn.Module, "_apply", moved)
        optimizers = sys.modules[torch.optim.Optimizer.__module__]
        name = "_get_fused_kernels_supported_devices"
        fused = getattr(optimizers, name)
        patch.setattr(optimizers, name, lambda: [*fused(), DEVICE.type])
        for name in ("tensor", "as_tensor"):  # they make tensors of this device without values
            patch.setattr(torch, name, _made_on_cpu_first(getattr(torch, name)))
        run = threading.Thread.run

        def run_here(thread: threading.Thread) -> None:
            if _GPU is not self:
                return run(thread)
            with self:  # modes are of one thread
                return run(thread)

        patch.setattr(threading.Thread, "run", run_here)


_GPU: PretendGpu | None = None


def _running() -> PretendGpu:
    if _GPU is None:
        raise RuntimeError("a tensor of the pretended GPU is used after its test")
    return _GPU


# The arguments of an operation are tensors, lists of them, and plain values: torch's own functions
# for trees take ten times as long.


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, one) for one in value])
    return value


def _value(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, PretendTensor) else tensor


def _factor(tensor: Tensor) -> Tensor:
    """The value of a factor as TF32 has it: float32 with 10 bits of mantissa, to nearest."""
    values = _value(tensor)
    if values.dtype != torch.float32:
        return values
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _by_mask(indices: Any) -> bool:
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in indices)


def _made_on_cpu_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE:
            return make(data, *args, device=device, **kwargs)
        if isinstance(data, PretendTensor):
            return data.to(kwargs.get("dtype", data.dtype))
        return make(data, *args, **kwargs).to(DEVICE)

    return made


def _ours(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PRODUCT in path.parts and "tests" not in path.parts:
            within = "/".join(path.parts[path.parts.index(PRODUCT) + 1 :])
            yield f"{within}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
