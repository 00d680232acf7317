"""Who is it, or nobody: people who are known by their recordings, without training anything."""
