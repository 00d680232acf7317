"""The command of `speed`."""

from benchmarks.translation.speed import main
from ext_common.cli import run

run(main)
