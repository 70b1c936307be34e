"""Simulation of the engine: the real scheduler, prefix cache and loop around a worker without tensors.

`toy_lm`: a language model whose KV slots are hashes of their whole prefix. `worker`: obeys plans to the
letter. `cases`: random configurations. `runner`: one case, checked. `shrink`: a smaller case that fails too.
`mutations`: planted bugs. `replay`: recorded plans. `python -m tests.sim` runs many cases.
"""
