"""Speed, memory and tables, beside peers; a package, as some wheels install a `benchmarks` of their own."""
