"""The old name of `python -m benchmarks.translation.tables`."""

from benchmarks.translation.tables import main

if __name__ == "__main__":
    main()
