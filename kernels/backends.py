"""Which implementation serves a call."""

import functools
import logging

import torch

BACKENDS = ("auto", "torch", "triton")

logger = logging.getLogger(__name__)


def resolve_backend(backend: str, device: torch.device) -> str:
    """Name the implementation that serves `backend` on `device`.

    Args:
        backend: "auto", "torch" or "triton".
        device: where the inputs live.

    Returns:
        "torch" or "triton"; "auto" is "triton" on a CUDA GPU and "torch" elsewhere.

    Raises:
        ValueError: `backend` is not one of the three names.
        NotImplementedError: the named implementation does not exist for this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if device.type != "cuda" and not _interpreted():
            raise NotImplementedError(
                f"backend 'triton': needs a CUDA GPU, got {device.type}; use backend='torch' or 'auto'"
            )
        return "triton"
    if backend == "auto":
        chosen = "triton" if device.type == "cuda" else "torch"
        _log_choice(chosen, device.type)
        return chosen
    return "torch"


HEAD_WIDTHS = (32, 64, 96, 128, 256)
WIDEST_CONVOLUTION = 8
# Bytes. In a kernel of the gradient its operands, and what is loaded ahead, take three times as much of shared memory.
LARGEST_TAPS_TABLE = 32 * 1024


def require_triton_support(
    op: str, dtype: torch.dtype, K: int, V: int, *, erase: str = "diagonal", content: bool = True
) -> None:
    """Refuse what the Triton kernels lack.

    Args:
        op: "gdn2" or "carve" for the chunk ops, "recurrent" for decoding.
        dtype: of q, k, v.
        K, V: head widths.
        erase, content: of "carve", and whether it has content maps.

    Raises:
        NotImplementedError: a width or dtype that no kernel takes, or one whose tiles exceed the shared memory of a
            Hopper SM. That is so for CARVE with content, one program of which holds a whole head: with diagonal erase
            above 128, and above 64 in float16 and float32, both held as float32; with delta erase in these two with K
            above 128, and in float32, whose operands are split in two, with V above 128 beside K above 64. Diagonal
            erase takes the same widths without content.
    """
    require_triton_dtype(dtype)
    widest_K = widest_V = HEAD_WIDTHS[-1]
    beside = ""
    if op == "carve":
        op = f"{op} with {erase} erase"
        if erase == "diagonal":
            widest_K = widest_V = 128 if dtype == torch.bfloat16 else 64
        elif content and dtype != torch.bfloat16:
            widest_K = 128
            if dtype == torch.float32 and K > 64:
                widest_V, beside = 128, f" beside K = {K}"
    require_triton_width(f"{op} in {_name(dtype)}", "K", K, widest_K)
    require_triton_width(f"{op} in {_name(dtype)}{beside}", "V", V, widest_V)


def require_triton_dtype(dtype: torch.dtype) -> None:
    """Raise NotImplementedError for float64, in which no kernel computes."""
    if dtype == torch.float64:
        raise NotImplementedError(f"backend 'triton': no {_name(dtype)}; use backend='torch'")


def require_triton_width(use: str, size: str, width: int, widest: int = HEAD_WIDTHS[-1]) -> None:
    """Raise NotImplementedError unless the head width named `size` is one of HEAD_WIDTHS and at most `widest`.

    Args:
        use: what the width is for, in the words of the message.
    """
    if width not in HEAD_WIDTHS or width > widest:
        legal = ", ".join(str(w) for w in HEAD_WIDTHS if w <= widest)
        raise NotImplementedError(
            f"backend 'triton': expected {size} of {legal} for {use}, got {width}; use backend='torch'"
        )


def require_triton_convolution(width: int) -> None:
    """Raise NotImplementedError for more taps than the short convolution's kernels hold in registers."""
    if width > WIDEST_CONVOLUTION:
        raise NotImplementedError(
            f"backend 'triton': expected at most {WIDEST_CONVOLUTION} taps in the short convolution, got {width}; "
            "use backend='torch'"
        )


def require_triton_dynamic_taps(dtype: torch.dtype, head_dim: int, width: int, rank: int) -> None:
    """Raise NotImplementedError for more features than the kernels' programs hold the table of, which makes taps of
    them for a head's channels; both count as powers of two, features from 16 on."""
    number = LARGEST_TAPS_TABLE // (2 if dtype == torch.bfloat16 else 4) // (width << (head_dim - 1).bit_length())
    highest = 0 if number < 16 else 1 << number.bit_length() - 1
    if rank > highest:
        raise NotImplementedError(
            f"backend 'triton': expected at most {highest} features (convolution_rank) of dynamic taps, {width} of "
            f"them for heads of {head_dim} in {_name(dtype)}, got {rank}; use backend='torch'"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _log_choice(chosen: str, device_type: str) -> None:
    """Say once per device type what "auto" became."""
    logger.info("backend 'auto' on %s: %s", device_type, chosen)
