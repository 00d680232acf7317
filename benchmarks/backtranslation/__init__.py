"""`python -m benchmarks.backtranslation` measures speed; `tables` trains; `report` makes the tables."""
