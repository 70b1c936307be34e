"""Tool calls in a model's text: one file for each family of formats, with its parser and its grammar."""
