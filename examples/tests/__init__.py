"""Tests of the examples: ``pytest examples``."""
