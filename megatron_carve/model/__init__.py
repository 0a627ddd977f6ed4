"""The model: the table of variants, their configuration, mixers and layers, and the stacks they stand in."""
