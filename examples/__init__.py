"""Examples of optax-adamod."""
