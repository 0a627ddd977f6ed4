"""The life of a server: from a bound socket to its end by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from aiohttp import web

from megatron_carve.serving.app import App, Settings
from megatron_carve.serving.worker import Closed, Worker

if TYPE_CHECKING:
    from megatron_carve.use.engine import Engine

logger = logging.getLogger("megatron_carve")

# Seconds that clients have to take the last they get, and that the engine has for its last step.
LAST_SECONDS = 5.0
# Seconds after which a connection without a request is closed.
IDLE_SECONDS = 75.0
BACKLOG = 1024
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that a port which is taken shows before a model is loaded.

    Raises:
        OSError: there is no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OSError(f"--host, --port: cannot listen on {host} port {port}: {reason}") from None
    return sock


def url(sock: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def runner_of(app: App) -> web.AppRunner:
    """aiohttp's runner: a client that goes away ends the handler of its request, and so what is made for it."""
    return web.AppRunner(
        app.build(), handler_cancellation=True, access_log=None, keepalive_timeout=IDLE_SECONDS, shutdown_timeout=1.0
    )


async def serve(
    make: Callable[[], contextlib.AbstractContextManager[Engine]], settings: Settings, sock: socket.socket, *,
    waiting: int, grace: float, ready: Callable[[], None],
) -> signal.Signals:  # fmt: skip
    """Serve until SIGINT or SIGTERM comes; returns which.

    From then on requests are refused, and those that run have `grace` seconds; a second signal ends these.

    Args:
        make: the engine, in a context that is entered and left in the thread that runs it.
        settings: what is served.
        sock: bound; closed at the end.
        waiting: choices that may wait for the engine.
        grace: see above.
        ready: called when requests are taken.

    Raises:
        RuntimeError: the engine failed, from what it raised; what making it raises comes as it is.
    """
    worker = Worker(make, waiting=waiting)
    await worker.start()
    app = App(worker, settings)
    runner = runner_of(app)
    with _signals() as came:
        try:
            await runner.setup()
            await web.SockSite(runner, sock, backlog=BACKLOG).start()
            ready()
            await _first(came.wait(), worker.ended.wait())
            app.stopping = True
            stopped_by = came.last
            if not worker.ended.is_set():
                came.clear()
                if app.busy:
                    logger.info("stopping: requests have %g s to end; another signal ends them now", grace)
                await _first(came.wait(), worker.ended.wait(), app.quiet(), seconds=grace)
            worker.abort(Closed("the server is stopping"))
            await _first(app.quiet(), seconds=LAST_SECONDS)
        finally:
            await runner.cleanup()
            await worker.close(LAST_SECONDS)
    if worker.error is not None:
        raise RuntimeError("the engine failed") from worker.error
    return stopped_by


class _Signal(asyncio.Event):
    """Set by a signal.

    Attributes:
        last: which it was.
    """

    last = signal.SIGTERM


@contextlib.contextmanager
def _signals() -> Iterator[_Signal]:
    """Inside, SIGINT and SIGTERM set an event."""
    came, loop = _Signal(), asyncio.get_running_loop()

    def note(number: signal.Signals) -> None:
        came.last = number
        came.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, note, number)
    try:
        yield came
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


async def _first(*waits: object, seconds: float | None = None) -> None:
    """Wait for one of these, at most so long."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
