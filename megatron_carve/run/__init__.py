"""A run, from its checked plan to its last checkpoint."""
