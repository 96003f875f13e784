"""A CUDA GPU that is not there: ``pytest -p fake_gpu tests/gpu`` runs the host's side of every test on CPU memory.

Modelled: which tensors are on the GPU, and which in pinned memory; operations on tensors of two devices; what makes the
host wait, under ``torch.cuda.set_sync_debug_mode("error")``; what a capture does not survive (waiting, copies from
pageable memory, pinning), and the random numbers that torch withholds after one; current streams. ``torch.cuda.graph``,
``stream`` and ``device`` are torch's own. What torch.cuda does not have, the fake has not either, and what it has takes
the arguments that it takes. The CUDA kernels run as host code, as under ``FASTSAM_CUDA_ON_HOST=1``.

Not modelled: replays of a graph (they do nothing; a step that is captured also runs), the order of streams, the
allocator, the GPU's own random numbers, autocast, the profiler, Triton, torch.compile, and what runs within torch's own
functions: a backward pass and its hooks, or a ``torch.nn.functional`` that called ``.item()``.
"""

import functools
import inspect
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)

_real_device = Tensor.device.__get__
_state = SimpleNamespace(sync_debug_mode=0, capturing=False, capture_broke=False, draws_withheld=False)

# ---- where a tensor is: noted at its storage, which its views and parameters share -------------------------------


def is_on_gpu(tensor):
    return _real_device(tensor).type == "cpu" and getattr(tensor.untyped_storage(), "on_gpu", False)


def place_of(tensor):
    return GPU if is_on_gpu(tensor) else _real_device(tensor)


def is_pinned(tensor):
    return getattr(tensor.untyped_storage(), "pinned", False)


def put(tensor, on_gpu=True):
    if _real_device(tensor).type == "cpu":
        tensor.untyped_storage().on_gpu = on_gpu
    return tensor


# ---- what the host may not do ------------------------------------------------------------------------------------


def break_capture(what):
    if _state.capturing:
        _state.capture_broke = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")


def wait_for_gpu(what):
    break_capture(what)
    if _state.sync_debug_mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")


#: What the host waits for; ``tensor`` and the like are made on the CPU, then copied.
WAITS = set(
    "item tolist numpy nonzero argwhere is_nonzero masked_select unique equal allclose bincount __bool__ __float__ "
    "__int__ __index__ __contains__ __array__ __repr__ __format__ tensor as_tensor".split()
)
DRAWS = set(
    "bernoulli bernoulli_ dropout dropout_ multinomial normal normal_ rand rand_like randint randint_like randn "
    "randn_like randperm random_ uniform_".split()
)
NO_OPERATIONS = {"__get__", "__set__", "_has_compatible_shallow_copy_type"}  # they read or replace attributes


def check_name(name):
    if name in WAITS:
        wait_for_gpu(name)
    if name in DRAWS and _state.draws_withheld and not _state.capturing:
        raise RuntimeError(f"Offset increment outside graph capture encountered unexpectedly. ({name})")


class FakeGpu(TorchFunctionMode):
    """Keeps account of every call into torch that Python makes."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == Tensor.device.__get__:
            return place_of(args[0])
        if function == Tensor.is_cuda.__get__:
            return is_on_gpu(args[0])
        if name in MOVES and args and isinstance(args[0], Tensor):
            return MOVES[name](*args, **kwargs)
        if kwargs.get("pin_memory"):
            return pin_memory(function(*args, **{**kwargs, "pin_memory": False}))
        if kwargs.get("device") is not None and name != "_parse_to":
            return make(name, function, args, kwargs)
        return compute(name, function, args, kwargs)


def compute(name, function, args, kwargs):
    """A call that leaves its operands where they are."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = [is_on_gpu(t) for t in tensors]
    if any(on_gpu):
        check_operands(name, args, tensors, on_gpu)
    out = function(*args, **kwargs)
    # A result is where its operands are; `p.grad`, which autograd made unseen, is where p is.
    if any(on_gpu[:1] if name in ("__get__", "__getitem__") else on_gpu):
        known = [t.untyped_storage()._cdata for t in tensors]
        for x in (x for x in tree_leaves(out) if isinstance(x, Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in known and not hasattr(storage, "on_gpu"):
                put(x)
    return out


def check_operands(name, args, tensors, on_gpu):
    """What an operation with tensors on the GPU must not do."""
    check_name(name)
    if name in ("__getitem__", "__setitem__") and on_gpu[0]:
        if not all(on_gpu):
            wait_for_gpu(f"{name} with a tensor on the CPU")
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])):
            wait_for_gpu(f"{name} with a mask")
    elif name not in NO_OPERATIONS and any(t.dim() and not there for t, there in zip(tensors, on_gpu, strict=True)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")


def make(name, function, args, kwargs):
    """A call with ``device=``."""
    if torch.device(kwargs["device"]).type != "cuda":
        return function(*args, **kwargs)
    check_name(name)
    return put(function(*args, **{**kwargs, "device": "cpu"}))


def move(tensor, *args, copy=False, **kwargs):
    """``Tensor.to``."""
    if args and isinstance(args[0], Tensor):
        args = (place_of(args[0]), args[0].dtype, *args[1:])
    place, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    there = is_on_gpu(tensor)
    elsewhere = place is not None and place.type != ("cuda" if there else "cpu")
    if elsewhere:
        check_copy(there or is_pinned(tensor), non_blocking)
    memory_format = memory_format or torch.preserve_format
    out = tensor.to(dtype=dtype or tensor.dtype, copy=copy or elsewhere, memory_format=memory_format)
    return put(out, there != elsewhere)


def copy_(tensor, source, non_blocking=False):
    if isinstance(source, Tensor) and source.numel() and is_on_gpu(tensor) != is_on_gpu(source):
        check_copy(is_pinned(source if is_on_gpu(tensor) else tensor), non_blocking)
    return tensor.copy_(source)


def check_copy(pinned, non_blocking):
    if not non_blocking:
        wait_for_gpu("a copy between CPU and GPU that is not non_blocking")
    elif not pinned:
        break_capture("a copy between the GPU and pageable memory")


def pin_memory(tensor):
    if is_on_gpu(tensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    break_capture("pinning memory")
    pinned = tensor.clone()
    pinned.untyped_storage().pinned = True
    return pinned


MOVES = {
    "to": move,
    "cpu": lambda tensor: move(tensor, "cpu"),
    "copy_": copy_,
    "pin_memory": pin_memory,
    "is_pinned": is_pinned,
}

# ---- torch.cuda --------------------------------------------------------------------------------------------------


def as_in(real, fake):
    """``fake`` with the name of ``real``, for calls that ``real`` takes."""
    try:
        signature = inspect.signature(real)
    except ValueError:  # in a build of torch for GPUs some are in C++
        return fake

    @functools.wraps(real)
    def called(*args, **kwargs):
        signature.bind(*args, **kwargs)
        return fake(*args, **kwargs)

    return called


class Stream:
    device, device_index = GPU, 0

    def __init__(self, device=None, priority=0):
        self.cuda_stream = id(self)  # an address, as of a real one

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class CUDAGraph:
    """A capture: while it lasts, everything runs as ever. One that broke ends in an error, as CUDA's does."""

    def register_generator_state(self, generator):
        assert isinstance(generator, Generator) and not _state.capturing

    def capture_begin(self, *args, **kwargs):
        assert not _state.capturing and _state.stream is not _state.default_stream
        _state.capturing, _state.capture_broke = True, False

    def capture_end(self):
        _state.capturing, _state.draws_withheld = False, _state.capture_broke
        if _state.capture_broke:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self):
        assert not _state.capturing


class Generator(torch.Generator):
    """The CPU's, with what generators of a GPU have besides."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        pass

    def graphsafe_get_state(self):
        return self

    def graphsafe_set_state(self, state):
        assert isinstance(state, Generator)


def set_sync_debug_mode(debug_mode):
    _state.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(debug_mode, debug_mode)


FUNCTIONS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_exchange_device": lambda device: 0,
    "_maybe_exchange_device": lambda device: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "is_bf16_supported": lambda including_emulation=True: True,
    "synchronize": lambda device=None: break_capture("synchronize"),
    "empty_cache": lambda: None,
    "memory_stats": lambda device=None: defaultdict(int),
    "current_stream": lambda device=None: _state.stream,
    "set_stream": lambda stream: setattr(_state, "stream", stream),
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: _state.capturing,
    "set_sync_debug_mode": set_sync_debug_mode,
    "get_sync_debug_mode": lambda: _state.sync_debug_mode,
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
}


class HostKernels:
    """The compiled CUDA kernels, run by the host whatever the stream."""

    def __init__(self, compiled):
        self._compiled = compiled

    def __getattr__(self, name):
        return functools.partial(self._launch, getattr(self._compiled, name))

    @staticmethod
    def _launch(kernel, where, *arguments):
        assert where[-1] == _state.stream.cuda_stream
        kernel((*where[:-1], None), *arguments)

    problem = staticmethod(lambda: "")
    capabilities = staticmethod(lambda: [(9, 0)])
    architectures = staticmethod(lambda: [900])


def parts_in_place(parts):
    """A run's parts, each with a storage of its own, are where the run is; DLPack tells no more than an address."""

    def called(run, flat):
        found = parts(run, flat)
        with torch._C.DisableTorchFunction():  # which the notes are made under
            for part in found:
                put(part, is_on_gpu(flat))
        return found

    return called


def install():
    for name, fake in FUNCTIONS.items():
        setattr(torch.cuda, name, as_in(getattr(torch.cuda, name), fake))
    for fake in (Stream, CUDAGraph):
        real = getattr(torch.cuda, fake.__name__)
        for name, function in vars(fake).items():
            if inspect.isfunction(function) and name in vars(real):  # the rest is in C++, and not in a build for CPUs
                setattr(fake, name, as_in(vars(real)[name], function))
        setattr(torch.cuda, fake.__name__, fake)
    _state.stream = _state.default_stream = Stream()
    torch._C._host_emptyCache = lambda: None  # torch.cuda.graph calls it
    torch._C._cuda_getCurrentRawStream = lambda device: _state.stream.cuda_stream
    torch.Generator = Generator
    torch.cuda.default_generators = (Generator(),)
    FakeGpu().__enter__()
    from fastsam.flat.runs import Run
    from fastsam.kernels import cuda

    Run._parts = parts_in_place(Run._parts)
    cuda._cuda = HostKernels(cuda._cuda)


def pytest_configure():
    install()
