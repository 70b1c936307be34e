"""One rank's share of the engine: KV pool, rows, model, sampler. Executes step plans."""
