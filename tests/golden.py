"""Makes golden.npz: trajectories of the authors' PyTorch release.

pip install adamod==0.0.3 torch==2.13.0 numpy && python tests/golden.py
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from adamod import AdaMod

STEPS = 60
CASES = {  # the authors' keyword arguments, and a factor on the learning rate by step
    "default": ({"lr": 1e-3}, None),
    "long_memory": ({"lr": 1e-2, "betas": (0.8, 0.98), "beta3": 0.9999}, None),
    "short_memory": ({"lr": 1e-3, "beta3": 0.5, "eps": 1e-4}, None),
    "adam": ({"lr": 1e-3, "beta3": 0.0}, None),
    "decay": ({"lr": 1e-2, "beta3": 0.9, "weight_decay": 5e-2}, None),
    "step_drop": ({"lr": 1e-2, "beta3": 0.9}, 0.1),  # from half-way on
}


def main() -> None:
    # The release calls add_ and addcmul_ with torch's old order of arguments.
    warnings.filterwarnings("ignore", "This overload of add", UserWarning)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(STEPS, 7)) * 10.0 ** np.arange(-4, 3)
    gradients[: STEPS // 2, 0] = 0.0  # a coordinate that wakes half-way
    start = rng.normal(size=7)
    arrays = {"gradients": gradients, "start": start}
    for name, (arguments, drop) in CASES.items():
        theta = torch.nn.Parameter(torch.tensor(start))
        optimizer = AdaMod([theta], **arguments)
        rows = {"theta": [], "exp_avg": [], "exp_avg_sq": [], "exp_avg_lr": []}
        for t, gradient in enumerate(gradients):
            if drop is not None and t == STEPS // 2:
                optimizer.param_groups[0]["lr"] *= drop
            theta.grad = torch.tensor(gradient)
            optimizer.step()
            state = optimizer.state[theta]
            rows["theta"].append(theta.detach().numpy().copy())
            for key in ("exp_avg", "exp_avg_sq", "exp_avg_lr"):
                rows[key].append(state[key].numpy().copy())
        arrays |= {f"{name}/{key}": np.stack(values) for key, values in rows.items()}
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
