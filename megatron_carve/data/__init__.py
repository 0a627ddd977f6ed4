"""From texts to tokens to batches."""
