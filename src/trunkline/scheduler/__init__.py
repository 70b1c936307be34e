"""Decides what runs in each step. `plan` is all that workers see of it."""
