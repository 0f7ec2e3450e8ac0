"""Tests of the benchmarks, which time nothing: ``pytest benchmarks``."""
