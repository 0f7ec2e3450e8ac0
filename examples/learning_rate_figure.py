"""Draws losses, and learning rates as one histogram per step."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73")
LINES = ("-", "--", ":", "-")


def plot(runs, rates, bins, path):
    pass
