"""The old name of `python -m benchmarks.speaker.tables`."""

from benchmarks.speaker.tables import main

if __name__ == "__main__":
    main()
