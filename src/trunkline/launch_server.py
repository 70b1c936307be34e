"""`python -m trunkline.launch_server`, the reference's way to start: the same as `trunkline serve`."""

from __future__ import annotations

import sys

from trunkline.cli.main import main
from trunkline.config.cli import argv

if __name__ == "__main__":
    sys.exit(main(["serve", *argv()]))
