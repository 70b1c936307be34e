"""Everything between text and token ids: tokeniser, incremental detokeniser, stop strings, chat templates."""
