"""The `trunkline` program. One module a command, imported only when it runs, so that `--help` is instant."""
