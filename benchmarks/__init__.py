"""Benchmarks of optax-adamod."""
