"""Parsers of the tool calls in a model's text, one file per format."""
