"""`python -m benchmarks.diffusion` measures speed; `tables` trains; `report` makes the tables."""
