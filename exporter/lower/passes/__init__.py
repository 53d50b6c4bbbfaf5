"""Graph passes: one change per file, each saying what it requires, does and ensures."""
