"""`python -m benchmarks.translation` measures speed; `tables` trains; `report` makes the tables."""
