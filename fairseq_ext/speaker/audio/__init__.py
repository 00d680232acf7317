"""Recordings: whole whatever their headers say, their samples, and how much of the spectrum is in them."""
