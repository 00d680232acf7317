"""The old name of `python -m benchmarks.diffusion.tables`."""

from benchmarks.diffusion.tables import main

if __name__ == "__main__":
    main()
