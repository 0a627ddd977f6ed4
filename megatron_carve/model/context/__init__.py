"""Context parallelism of a mixer: by heads, and by sequence."""
