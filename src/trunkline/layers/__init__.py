"""Building blocks of models: linear, norm, rope, embedding, and the sampler."""
