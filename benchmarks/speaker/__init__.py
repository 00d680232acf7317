"""`python -m benchmarks.speaker` measures speed; `tables` trains; `report` makes the tables."""
