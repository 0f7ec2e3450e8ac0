"""Makes golden.npz and golden_model.npz, what PyTorch's AdaMods do.

The first holds trajectories of the authors' release. The second holds, by package, a
small model in the middle of a training, and its parameters in the steps that follow.

pip install adamod==0.0.3 torch-optimizer==0.3.0 pytorch-optimizer==4.1.0 torch==2.13.0
python tests/golden.py
"""

import json
import warnings
from pathlib import Path

import adamod
import numpy as np
import pytorch_optimizer
import torch
import torch_optimizer

STEPS = 60
CASES = {  # the authors' keyword arguments, and a factor on the learning rate by step
    "default": ({"lr": 1e-3}, None),
    "long_memory": ({"lr": 1e-2, "betas": (0.8, 0.98), "beta3": 0.9999}, None),
    "short_memory": ({"lr": 1e-3, "beta3": 0.5, "eps": 1e-4}, None),
    "adam": ({"lr": 1e-3, "beta3": 0.0}, None),
    "decay": ({"lr": 1e-2, "beta3": 0.9, "weight_decay": 5e-2}, None),
    "step_drop": ({"lr": 1e-2, "beta3": 0.9}, 0.1),  # from half-way on
}
BEFORE, AFTER = 30, 10  # steps of the model
PACKAGES = {  # of one algorithm, with the same hyperparameters
    "adamod": (adamod.AdaMod, {"betas": (0.9, 0.98), "beta3": 0.95}),
    "torch_optimizer": (torch_optimizer.AdaMod, {"betas": (0.9, 0.98), "beta3": 0.95}),
    "pytorch_optimizer": (pytorch_optimizer.AdaMod, {"betas": (0.9, 0.98, 0.95)}),
}


def trajectories() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(STEPS, 7)) * 10.0 ** np.arange(-4, 3)
    gradients[: STEPS // 2, 0] = 0.0  # a coordinate that wakes half-way
    start = rng.normal(size=7)
    arrays = {"gradients": gradients, "start": start}
    for name, (arguments, drop) in CASES.items():
        theta = torch.nn.Parameter(torch.tensor(start))
        optimizer = adamod.AdaMod([theta], **arguments)
        rows = {"theta": [], "exp_avg": [], "exp_avg_sq": [], "exp_avg_lr": []}
        for t, gradient in enumerate(gradients):
            if drop is not None and t == STEPS // 2:
                optimizer.param_groups[0]["lr"] *= drop
            theta.grad = torch.tensor(gradient)
            optimizer.step()
            state = {"theta": theta.detach(), **optimizer.state[theta]}
            for key, values in rows.items():
                values.append(state[key].numpy().copy())
        arrays |= {f"{name}/{key}": np.stack(values) for key, values in rows.items()}
    return arrays


def models() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(BEFORE + AFTER, 16, 4))
    targets = rng.normal(size=(BEFORE + AFTER, 16, 3))
    arrays = {"inputs": inputs[BEFORE:], "targets": targets[BEFORE:]}
    for package, (factory, arguments) in PACKAGES.items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
        ).double()
        named = dict(model.named_parameters())
        optimizer = factory(
            named.items(), lr=1e-2, eps=1e-6, weight_decay=0.1, **arguments
        )
        after = {name: [] for name in named}
        for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):
            if t == BEFORE:
                arrays |= snapshot(package, named, optimizer.state_dict())
            loss = torch.nn.functional.mse_loss(model(torch.tensor(x)), torch.tensor(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, parameter in named.items():
                after[name].append(parameter.detach().numpy().copy())
        for name, values in after.items():
            arrays[f"{package}/after/{name}"] = np.stack(values[BEFORE:])
    arrays["names"] = np.array(list(named))
    return arrays


def snapshot(package: str, named: dict, state_dict: dict) -> dict[str, np.ndarray]:
    """Copies the parameters and the optimizer's state as it stands, into arrays."""
    groups = json.dumps(state_dict["param_groups"])
    arrays = {f"{package}/param_groups": np.array(groups)}
    for name, parameter in named.items():
        arrays[f"{package}/before/{name}"] = parameter.detach().numpy().copy()
    for index, stored in state_dict["state"].items():
        for key, value in stored.items():
            arrays[f"{package}/state/{index}/{key}"] = np.asarray(value).copy()
    return arrays


if __name__ == "__main__":
    # The release calls add_ and addcmul_ with torch's old order of arguments.
    warnings.filterwarnings("ignore", "This overload of add", UserWarning)
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **trajectories())
    np.savez_compressed(Path(__file__).with_name("golden_model.npz"), **models())
