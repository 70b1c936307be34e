"""House rules of the tree, as a program: `python -m tools.check`. Standard library only."""
