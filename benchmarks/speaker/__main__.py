"""The command of `speed`."""

from benchmarks.speaker.speed import main
from ext_common.cli import run

run(main)
