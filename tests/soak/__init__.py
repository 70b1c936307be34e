"""A server under many clients with all kinds of requests, which come and go: `python -m tests.soak`."""
