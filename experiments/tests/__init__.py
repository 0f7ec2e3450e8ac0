"""Tests of the experiments, at a few steps each: ``pytest experiments``."""
