"""Trunkline beside public CPU engines: the same checkpoint and token ids, interleaved runs, one table."""
