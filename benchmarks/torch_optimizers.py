"""PyTorch's Adam, and every AdaMod that was published for it, where installed."""

import importlib
import importlib.util
from typing import Any

import numpy as np

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

    def __init__(self, name: str, gradients: dict[str, np.ndarray]):
        torch = importlib.import_module("torch")
        module, optimizer, arguments = _OPTIMIZERS[name]
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        params = []
        for gradient in gradients.values():
            gradient = torch.tensor(gradient, device="cuda" if self.cuda else "cpu")
            params.append(torch.zeros_like(gradient, requires_grad=True))
            params[-1].grad = gradient
        factory = getattr(importlib.import_module(module), optimizer)
        self.optimizer = factory(params, lr=1e-3, **arguments)

    def run(self, times: int) -> None:
        """Updates that many times; returns when all is computed."""
        for _ in range(times):
            self.optimizer.step()
        if self.cuda:
            self.cuda.synchronize()
