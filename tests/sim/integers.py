"""The integers of the toy language model and of its grammars."""

VOCAB_SIZE = 64
NUM_SAMPLED = 24  # the model yields ids below; ids from NUM_SAMPLED on occur in prompts only
EOS_IDS = (0, 1)

_MASK = (1 << 60) - 1


def mix(value: int) -> int:
    """A 60-bit hash. Own arithmetic, so that recorded plans do not depend on the Python version."""
    value = (value * 0x2545F4914F6CDD1D) & _MASK
    value ^= value >> 29
    value = (value * 0x1B03738712FAD5C9) & _MASK
    return value ^ (value >> 32)
