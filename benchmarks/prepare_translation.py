"""The old name of `python -m benchmarks.translation.prepare`."""

from benchmarks.translation.prepare import main
from ext_common.cli import run

if __name__ == "__main__":
    run(main)
