"""One program per engine, run in that engine's environment: standard library and the engine only."""
