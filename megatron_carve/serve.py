"""Serve a trained model over HTTP: `python -m megatron_carve.serve RUN`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_carve.run.program import exit_status, run_parser
from megatron_carve.run.stopping import Stopped

if TYPE_CHECKING:
    import socket

    from megatron_carve.use.engine import Engine
    from megatron_carve.use.trained import Trained

# Those of the engine.
MAX_REQUESTS, STEP_TOKENS = 64, 4096

DESCRIPTION = """
Serves the model of a run over HTTP, in the form of OpenAI's completions and chat completions, until Ctrl-C or
SIGTERM. The address is printed on standard output when it takes requests; opened in a browser, it is a page for
trying prompts.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status. A user's mistake ends in one line on stderr and status 2."""
    parser = run_parser("serve", DESCRIPTION)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--name", help="of the model, for clients (default: the run's)")
    parser.add_argument(
        "--max-sequence", type=int, metavar="N", help="tokens of a prompt and its continuation (default: as trained)"
    )
    parser.add_argument(
        "--max-requests", type=int, default=MAX_REQUESTS, metavar="N",
        help="that the model runs at a time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--step-tokens", type=int, default=STEP_TOKENS, metavar="N",
        help="that it reads in a step, of all requests together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--queue", type=int, default=256, metavar="N", help="requests that may wait; more are refused (default: 256)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="of a request, waiting included (default: 600)"
    )
    parser.add_argument(
        "--grace", type=float, default=10, metavar="SECONDS", help="for requests to end when stopped (default: 10)"
    )
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    chosen = parser.parse_args(arguments)
    return exit_status(lambda: _serve(chosen))


def _serve(chosen: argparse.Namespace) -> None:
    _check(chosen)
    server = _require_libraries()
    with server.bound_socket(chosen.host, chosen.port) as sock:
        _run(chosen, sock)


def _run(chosen: argparse.Namespace, sock: socket.socket) -> None:
    # Here because torch and Megatron take seconds to import; a typing mistake need not wait.
    from megatron_carve.serving.app import Settings
    from megatron_carve.serving.server import serve, url
    from megatron_carve.use.trained import trained_model

    name = chosen.name or Path(chosen.run).resolve().name
    with trained_model(chosen.run, device=chosen.device, step=chosen.step) as trained:
        settings = Settings(name, trained.tokenizer, trained.vocab_size, timeout=chosen.timeout)
        stopped_by = asyncio.run(
            serve(
                partial(_engine, trained, chosen), settings, sock, waiting=chosen.queue, grace=chosen.grace,
                ready=lambda: print(f"{name}, step {trained.step}: {url(sock)}", flush=True),
            )
        )  # fmt: skip
    raise Stopped("stopped", stopped_by)


@contextlib.contextmanager
def _engine(trained: Trained, chosen: argparse.Namespace) -> Iterator[Engine]:
    """For a thread of its own, which shares with the one that loaded the model what torch keeps by thread."""
    import torch

    from megatron_carve.patches import cpu_mode_in_this_thread
    from megatron_carve.use.engine import Engine

    with cpu_mode_in_this_thread():
        if trained.device.type == "cuda":
            torch.cuda.set_device(next(trained.model.parameters()).device)
        engine = Engine(
            trained, max_requests=chosen.max_requests, max_tokens=chosen.step_tokens, max_sequence=chosen.max_sequence
        )
        with contextlib.closing(engine):
            yield engine


def _check(chosen: argparse.Namespace) -> None:
    for name, least in (("max_requests", 1), ("step_tokens", 2), ("max_sequence", 2), ("queue", 0)):
        value = getattr(chosen, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if chosen.step_tokens <= chosen.max_requests:
        wanted = f"expected more than --max-requests {chosen.max_requests}"
        raise ValueError(f"--step-tokens: {wanted}, got {chosen.step_tokens}")
    if not 0 <= chosen.port < 2**16:
        raise ValueError(f"--port: expected 0 to {2**16 - 1}, got {chosen.port}")
    if not 0 < chosen.timeout < math.inf:
        raise ValueError(f"--timeout: expected seconds above 0, got {chosen.timeout}")
    if not 0 <= chosen.grace < math.inf:
        raise ValueError(f"--grace: expected seconds of at least 0, got {chosen.grace}")


def _require_libraries() -> Any:
    try:
        from megatron_carve.serving import server
    except ImportError as error:
        raise ImportError(f'serving needs {error.name} ({error}); run: pip install "megatron-carve[serve]"') from error
    return server


if __name__ == "__main__":
    sys.exit(main())
