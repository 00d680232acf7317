"""The old name of `python -m benchmarks.backtranslation.tables`."""

from benchmarks.backtranslation.tables import main

if __name__ == "__main__":
    main()
