"""CARVE and Gated DeltaNet-2 token mixers for Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns of every optional package that is missing, a dozen lines; our log says which layers are used.
warnings.filterwarnings(
    "ignore",
    message=r".*(is|are) not installed|Only transformer-engine>=",
    category=UserWarning,
    module=r"megatron\.core\.",
)
