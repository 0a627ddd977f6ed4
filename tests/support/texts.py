"""A text with characters of every length in UTF-8."""

LINES = "".join(f"line {i}: naïve — 日本語 🙂 {'x' * (i % 7)}\n" for i in range(200))
