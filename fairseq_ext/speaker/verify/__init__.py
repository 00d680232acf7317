"""Is it the same person? Scores of pairs of recordings, what is fitted for them, and how good they are."""
