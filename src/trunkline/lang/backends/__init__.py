"""Where programs run: our servers and engines, OpenAI-compatible endpoints, Anthropic."""
