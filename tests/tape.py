"""A CUDA graph's double on the CPU, for tests: a tape of what a step ran, which can be run again.

As with a CUDA graph, recording leaves no effect, a replay repeats every operation and kernel launch on the same memory
with the same numbers, and nothing that Python decided is decided again. Waiting for a value breaks a recording.
"""

import contextlib

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: The operations behind .item(), bool(tensor), print(tensor).
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}


class Tape(TorchDispatchMode):
    """Records while it is entered."""

    def __init__(self):
        super().__init__()
        self.entries = []
        self._before = {}  # what recording wrote to, as it was
        self._written = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in pytree.tree_leaves(value):
                    self.keep(tensor)
                    self._written.append(tensor)
        out = function(*args, **kwargs)
        views = any(r.alias_info is not None for r in function._schema.returns)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        if writes or not views:
            fresh = [] if writes else [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.entries.append(lambda: self._again(function, args, kwargs, fresh))
        return out

    def keep(self, tensor):
        """Notes the values of a tensor that is about to be written to."""
        storage = tensor.untyped_storage()
        self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        # torch does not see what a graph writes.
        with contextlib.ExitStack() as unseen:
            for tensor in self._written:
                unseen.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
            for entry in self.entries:
                entry()

    @staticmethod
    def _again(function, args, kwargs, fresh):
        out = [t for t in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        for place, value in zip(fresh, out, strict=False):
            place.copy_(value)


class WaitingRefused(TorchDispatchMode):
    """As ``torch.cuda.set_sync_debug_mode("error")``."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return function(*args, **(kwargs or {}))


class Launches:
    """The compiled kernels, with every launch noted on the tape that is being recorded."""

    def __init__(self, compiled):
        self._compiled = compiled
        self.tape = None
        self.names = []

    def __getattr__(self, name):
        function = getattr(self._compiled, name)
        if name not in ("gram", "climb", "descend_sgd", "descend_adam", "restore"):
            return function

        def launch(*arguments):
            self.names.append(name)
            if self.tape is not None:
                self.tape.entries.append(lambda: function(*arguments))
            function(*arguments)

        return launch


class HostGpu:
    """In the place of :class:`fastsam.graphs.Gpu`. ``optimizer`` and ``model`` are whose memory launches write to."""

    def __init__(self, launches, optimizer, model):
        self._launches, self._optimizer, self._model = launches, optimizer, model
        self._first = self._second = None
        self.recorded = []

    @contextlib.contextmanager
    def warming_up(self):
        yield

    def waiting_refused(self):
        return WaitingRefused()

    def record(self, step):
        tape = Tape()
        for tensor in self._memory():
            tape.keep(tensor)
        generator = torch.get_rng_state()
        self._launches.tape = self._tape = tape
        try:
            with tape:
                step()
        finally:
            self._launches.tape = self._tape = None
            tape.undo()
            torch.set_rng_state(generator)
        self.recorded.append(tape)
        return tape.replay

    @contextlib.contextmanager
    def masks_again(self):
        def begin():
            self._first = torch.get_rng_state()
            torch.set_rng_state(self._second)

        self._tape.entries.append(begin)
        yield
        self._tape.entries.append(lambda: torch.set_rng_state(self._first))

    def align_masks(self):
        self._second = torch.get_rng_state()

    def _memory(self):
        yield from (p.detach() for group in self._optimizer.param_groups for p in group["params"])
        yield from self._model.buffers()
        for space in self._optimizer.two_pass.spaces:
            yield from (buffer.flat for buffer in space._buffers.values())
            yield from (space.table.counter, space.table.partials, *space.table.sums)
