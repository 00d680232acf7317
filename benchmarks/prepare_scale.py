"""The old name of `python -m benchmarks.speaker.prepare`."""

from benchmarks.speaker.prepare import main
from ext_common.cli import run

if __name__ == "__main__":
    run(main)
