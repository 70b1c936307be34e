"""Attention backends: from a step's batch to each layer's attention."""
