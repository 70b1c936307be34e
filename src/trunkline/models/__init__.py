"""Decoder models: shared blocks, one short file per architecture, weight loading."""
