"""What is told of a program before it runs: its collectives rank by rank,
the proof that they match, and their cost."""
