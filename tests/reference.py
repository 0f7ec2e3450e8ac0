"""AdaMod in float64 NumPy: the paper's Algorithm 1 and the authors' release.

Written from the equations, one line each, with nothing of the library in it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# The trajectories of golden.npz: names, arguments of ours, and a factor on the learning
# rate from half-way on.
RELEASE = [
    ("default", dict(peak=1e-3), 1.0),
    ("long_memory", dict(b1=0.8, b2=0.98, b3=0.9999, peak=1e-2), 1.0),
    ("short_memory", dict(b3=0.5, eps=1e-4, peak=1e-3), 1.0),
    ("adam", dict(b3=0.0, peak=1e-3), 1.0),
    ("decay", dict(b3=0.9, weight_decay=5e-2, peak=1e-2), 1.0),
    ("step_drop", dict(b3=0.9, peak=1e-2), 0.1),
]


@dataclasses.dataclass(frozen=True)
class AdaMod:
    """Updates of one array; complex gradients have real ``v`` and ``s``."""

    alpha: Callable[[int], float]  # learning rate of step t = 1, 2, ...
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    nesterov: bool = False
    convention: str = "paper"

    def step(self, t, g, m, v, s):
        """Returns m_t, v_t, eta_t, s_t and theta_t - theta_{t-1}."""
        m = self.b1 * m + (1 - self.b1) * g
        v = self.b2 * v + (1 - self.b2) * np.abs(g) ** 2
        if self.convention == "paper":
            v_hat = v / (1 - self.b2**t)
            eta = self.alpha(t) / (np.sqrt(v_hat + self.eps_root) + self.eps)
        else:
            corrected = self.alpha(t) * np.sqrt(1 - self.b2**t) / (1 - self.b1**t)
            eta = corrected / (np.sqrt(v + self.eps_root) + self.eps)
        s = self.b3 * s + (1 - self.b3) * eta
        return m, v, eta, s, -self.rate(t, eta, s) * self.m_hat(t, g, m)

    def rate(self, t, eta, s):
        return np.sign(self.alpha(t)) * np.minimum(np.abs(eta), np.abs(s))

    def m_hat(self, t, g, m):
        if self.convention == "torch":
            return m
        if self.nesterov:
            last = (1 - self.b1) * g / (1 - self.b1**t)
            return self.b1 * m / (1 - self.b1 ** (t + 1)) + last
        return m / (1 - self.b1**t)

    def trajectory(self, gradients):
        """Runs all gradients, shape (steps, ...); returns stacked results.

        ``update_size`` and ``bound_size`` are what u_t and s_t would be if nothing in
        their averages cancelled, as |g| and |eta| do not.
        """
        wide = np.complex128 if np.iscomplexobj(gradients) else np.float64
        gradients = np.asarray(gradients, wide)
        m = np.zeros_like(gradients[0])
        v, s, m_size, s_size = (np.zeros_like(m, np.float64) for _ in range(4))
        names = "mu", "nu", "bound", "update", "bound_size", "update_size"
        out = {name: [] for name in names}
        for t, g in enumerate(gradients, start=1):
            m, v, eta, s, update = self.step(t, g, m, v, s)
            m_size = self.b1 * m_size + (1 - self.b1) * np.abs(g)
            s_size = self.b3 * s_size + (1 - self.b3) * np.abs(eta)
            rate_size = np.minimum(np.abs(eta), s_size)
            update_size = rate_size * self.m_hat(t, np.abs(g), m_size)
            row = (m, v, s, update, s_size, update_size)
            for values, value in zip(out.values(), row, strict=True):
                values.append(value)
        return {name: np.stack(values) for name, values in out.items()}
