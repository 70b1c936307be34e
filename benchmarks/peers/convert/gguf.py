"""`python -m benchmarks.peers.convert.gguf LLAMA_CPP MODEL OUT`: llama.cpp's converter, any tokenizer.

It knows tokenizers by the digest of what they produce and refuses others. Prompts here are token ids, so that
the rule by which text would be split plays no part.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module

if __name__ == "__main__":
    source, model, target = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import_module("conversion.base").TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf", model, "--outtype", "bf16", "--outfile", target]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
