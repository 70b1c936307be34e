"""Programs of eleven shapes, with synthetic data, and a driver that says what the prefix cache does for
each."""
