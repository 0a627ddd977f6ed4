"""CARVE and Gated DeltaNet-2 token mixers for Megatron-Core."""

__version__ = "0.1.0"
