"""How many bytes of tensors are alive at most, counted allocation by allocation; also without doing the arithmetic."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations return while this is active: `peak`, the most bytes alive at a time.

    Under FakeTensorMode nothing is computed and nothing is allocated, and the count is the same.
    """

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self._note(x.untyped_storage())
        return results

    def ignore(self, *tensors):
        """Do not count these: they were there before."""
        for x in tensors:
            self._seen[x.untyped_storage()] = None

    def _note(self, storage):
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = weakref.finalize(storage, self._free, size)
        self.current += size
        self.peak = max(self.peak, self.current)

    def _free(self, size):
        self.current -= size
