"""PyTorch's Adam, and every AdaMod that was published for it, where installed."""

import importlib
import importlib.util
from typing import Any

from benchmarks.common import trees

# Module, class and arguments of each.
_OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PyTorch Adam, fused": ("torch.optim", "Adam", {"fused": True}),
    "PyTorch Adam, foreach": ("torch.optim", "Adam", {"foreach": True}),
    "PyTorch AdaMod, adamod": ("adamod", "AdaMod", {}),
    "PyTorch AdaMod, torch_optimizer": ("torch_optimizer", "AdaMod", {}),
    "PyTorch AdaMod, pytorch_optimizer": ("pytorch_optimizer", "AdaMod", {}),
}
NAMES = tuple(_OPTIMIZERS)
PACKAGES = ("adamod", "torch-optimizer", "pytorch-optimizer")


def missing() -> set[str]:
    """Returns those whose package is not installed."""
    return {
        name
        for name, (module, _, _) in _OPTIMIZERS.items()
        if importlib.util.find_spec(module.split(".")[0]) is None
    }


class Update:
    """Updates of parameters by one of these optimizers, on a GPU where there is one."""

    compile_seconds = None  # it compiles nothing

    def __init__(self, name: str, tree: trees.Tree):
        torch = importlib.import_module("torch")
        module, optimizer, arguments = _OPTIMIZERS[name]
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        device = "cuda" if self.cuda else "cpu"
        params = []
        for leaf in tree.values():
            params.append(torch.zeros(leaf.shape, device=device, requires_grad=True))
            params[-1].grad = torch.randn(leaf.shape, device=device)
        factory = getattr(importlib.import_module(module), optimizer)
        self.optimizer = factory(params, lr=1e-3, **arguments)

    def run(self, times: int) -> None:
        """Updates that many times; returns when all is computed."""
        for _ in range(times):
            self.optimizer.step()
        if self.cuda:
            self.cuda.synchronize()

    def peak(self) -> int | None:
        """Returns the most bytes that these updates have held on a GPU."""
        return self.cuda.max_memory_allocated() if self.cuda else None
