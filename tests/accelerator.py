"""A simulated accelerator: tensors that compute on the CPU and behave as if on a device, and a count of what would cost time there.

`Accelerator()` is a context. Inside it, `tensor.to("sim")` and `device="sim"` give tensors of the device. A tensor with dimensions
that is on the CPU cannot be mixed with them, as on a GPU. What it counts:

- `reads`: looks of the host at values of the device, each of which waits for all work before it (`bool(x)`, `x.item()`, `x.cpu()`, ...)
- `operations`: kernels that would be launched; views are none
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing


DEVICE = "sim"
# Operations that give the host a number, or a result whose size depends on values.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
READS |= {"nonzero", "masked_select", "unique_consecutive", "_unique2"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # take indices of the CPU as well
NO_KERNEL = {"detach", "alias", "_unsafe_view", "lift_fresh"}


class _Module(backend_registration._DummyBackendModule):
    """The device module. It is never chosen by itself: no other test of the process shall see a device."""

    def is_available(self):
        return False


class SimTensor(torch.Tensor):
    """A tensor of the device. Its values are in `host`, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=f"{DEVICE}:0"
        )

    def __init__(self, host: torch.Tensor):
        self.host = host

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(None, function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a device tensor to numpy: copy it to the CPU first")


class _Functions(TorchFunctionMode):
    """Makes tensors of Python's values on the CPU, also those of indices. Attention without gradients is one kernel, as on a GPU."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and not torch.is_grad_enabled() and isinstance(args[0], SimTensor):
            if any(
                isinstance(each, torch.Tensor) and not isinstance(each, SimTensor)
                for each in (*args, *kwargs.values())
            ):
                raise RuntimeError(f"attention: tensors of {DEVICE} and of the CPU")
            self.count.operations += 1
            args, kwargs = _map((args, kwargs), lambda each: getattr(each, "host", each))
            return SimTensor(function(*args, **kwargs))
        if function in (torch.tensor, torch.as_tensor) and _is_sim(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], SimTensor):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(place) if isinstance(place, list) else place for place in places)
            args = (args[0], places, *args[2:])
        return function(*args, **kwargs)


class Accelerator(TorchDispatchMode):
    """Counts `reads` and `operations` inside its block."""

    def __init__(self):
        super().__init__()
        if torch._C._get_privateuse1_backend_name() != DEVICE:
            backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Module())
        self.reads = self.operations = 0
        self._functions = _Functions(self)

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(self, function, args, kwargs or {})


def _is_sim(device) -> bool:
    return device is not None and torch.device(device).type == DEVICE


def _map(value, change):
    """Change the tensors in what an operation takes or gives: lists and dicts of them. The trees of torch are slow."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(item, change) for item in value])
    return {key: _map(item, change) for key, item in value.items()} if isinstance(value, dict) else value


def _run(count: Accelerator | None, function, args, kwargs):
    name, device, tensors = function.overloadpacket.__name__, kwargs.get("device"), []
    host_args, host_kwargs = _map((args, kwargs), lambda each: tensors.append(each) or getattr(each, "host", each))
    on_device = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    if not on_device and not _is_sim(device):
        return function(*args, **kwargs)
    goes_to_cpu = bool(on_device) and device is not None and not _is_sim(device)
    if name == "copy_":
        goes_to_cpu = not isinstance(args[0], SimTensor)
    elif on_device and name != "_to_copy":
        mixed = [tensor for tensor in tensors if not isinstance(tensor, SimTensor) and tensor.dim()]
        if mixed and name not in INDEXED:
            raise RuntimeError(f"{name}: tensors of {DEVICE} and of the CPU, {[tuple(each.shape) for each in mixed]}")
    if count is not None:
        places = args[1] if name in INDEXED else ()
        by_mask = any(isinstance(place, SimTensor) and place.dtype == torch.bool for place in places)
        count.reads += name in READS or goes_to_cpu or by_mask
        is_view = any(each.alias_info and not each.alias_info.is_write for each in function._schema.arguments)
        count.operations += not is_view and name not in NO_KERNEL | READS
    result = function(*host_args, **host_kwargs | ({"device": "cpu"} if device is not None else {}))
    if not goes_to_cpu:
        result = _map(result, lambda each: each if isinstance(each, SimTensor) else SimTensor(each))
    if name == "_to_copy" or not on_device or goes_to_cpu:
        return result
    return return_and_correct_aliasing(function, args, kwargs, result)
