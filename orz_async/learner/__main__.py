"""`torchrun [--nproc-per-node N] -m orz_async.learner RECIPE_OR_TOML [--section.setting value ...]`

Plain `python -m orz_async.learner` is one rank. A run_dir that holds checkpoints is resumed.
"""

from __future__ import annotations

import os
import sys

from orz_async.observe.process import run_main


def main() -> None:
    # torch and transformers take seconds to import: --help and a wrong option should not.
    from orz_async.cli_config import parse_config

    config = parse_config(sys.argv[1:], prog="torchrun -m orz_async.learner")
    from orz_async.learner.start import start

    start(config)


if __name__ == "__main__":
    run_main(main, process=f"learner-{os.environ.get('RANK', '0')}")
