"""The command of `speed`."""

from benchmarks.diffusion.speed import main
from ext_common.cli import run

run(main)
