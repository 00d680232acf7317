"""The command of `speed`."""

from benchmarks.backtranslation.speed import main
from ext_common.cli import run

run(main)
