"""Writers of the forms in which engines load a checkpoint. They run in the engine's environment."""
