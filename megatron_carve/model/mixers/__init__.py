"""The token mixers, a class a file."""
