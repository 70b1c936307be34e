"""KV pages and the radix tree that shares them. Host data; the tensors behind the ids belong to workers."""

from trunkline.cache.radix import Lease, PrefixCache

__all__ = ["Lease", "PrefixCache"]
