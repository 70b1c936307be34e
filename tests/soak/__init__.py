"""A server under many clients that come and go: `python -m tests.soak`."""
