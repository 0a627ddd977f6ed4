"""An engine in a thread of its own; what it makes is handed to readers in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_carve.use.engine import Engine, Sampling, Step

logger = logging.getLogger("megatron_carve")

# Steps of one request that may wait for their reader.
MOST_PENDING = 1024
# Steps of the engine that may wait for the event loop.
MOST_AHEAD = 8


class Refused(ValueError):
    """What the engine says of a request that it cannot take."""


class Busy(Exception):
    """There is no room for a request now."""


class Closed(Exception):
    """The engine takes no requests any more, or has given up those that it had."""


class TooSlow(Exception):
    """A reader left so many steps waiting that its request was given up."""


class Stream:
    """Steps of the choices of one request, for one reader in the event loop.

    Attributes:
        open: choices that have not finished.
    """

    def __init__(self, choices: int) -> None:
        self.open = set(range(choices))
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending: list[tuple[int, Step]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    async def take(self) -> list[tuple[int, Step]]:
        """Steps that have come since the last call, with the number of their choice; none when all have finished.

        Raises:
            Closed, TooSlow: the request was given up.
        """
        while not self._pending and self._error is None and self.open:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        taken, self._pending = self._pending, []
        return taken

    def put(self, choice: int, step: Step) -> None:
        """Called in the event loop, as are the others."""
        if choice in self.open:
            self._pending.append((choice, step))
            if step.finish is not None:
                self.open.remove(choice)
            self._news.set()

    @property
    def overflows(self) -> bool:
        return len(self._pending) > MOST_PENDING

    def fail(self, error: Exception) -> None:
        """Give the request up; its reader is told."""
        self._error = self._error or error
        self.open.clear()
        self._pending = []
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._news.set()


class Worker:
    """Runs an engine in a thread, for requests of one event loop.

    Args:
        make: the engine, in a context that is entered and left in the thread that runs it.
        waiting: choices that may wait while the engine has as many as it runs at once.

    Attributes:
        ended: set when the thread has ended, by `close` or by an error.
        error: by which it ended.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[Engine]], *, waiting: int) -> None:
        self.ended = asyncio.Event()
        self.error: BaseException | None = None
        self.max_sequence = self.max_requests = 0
        self._make, self._waiting = make, waiting
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._ahead = threading.Semaphore(MOST_AHEAD)
        self._owners: dict[int, tuple[Stream, int]] = {}  # of the engine's requests; the thread's own
        self._ready: asyncio.Future[None] = self._loop.create_future()
        # So that a step which never returns does not hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    async def start(self) -> None:
        """Raises what making the engine raises."""
        self._thread.start()
        await self._ready

    async def close(self, seconds: float) -> None:
        """Give up what still runs, and wait for the thread at most so long."""
        self.abort(Closed("the server is stopping"))
        self._inbox.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ended.wait(), seconds)

    def abort(self, error: Exception) -> None:
        """Give up all requests."""
        for stream in self._streams:
            stream.fail(error)

    @property
    def running(self) -> int:
        """Choices that the engine has."""
        return sum(len(stream.open) for stream in self._streams)

    @property
    def capacity(self) -> int:
        """Choices that it may have, those that wait included."""
        return self.max_requests + self._waiting

    @contextlib.asynccontextmanager
    async def request(self, choices: Sequence[tuple[Sequence[int], Sampling]]) -> AsyncIterator[Stream]:
        """Have tokens made for every prompt and its sampling; what still runs at the end of the context is cancelled.

        Raises:
            Refused: the engine never takes such a prompt, or so many choices.
            Busy: there is no room.
            Closed: the worker has ended.
        """
        if self.ended.is_set():
            raise Closed("the engine has ended")
        if len(choices) > self.capacity:
            raise Refused(f"n: expected at most {self.capacity} choices for all prompts together, got {len(choices)}")
        if self.running + len(choices) > self.capacity:
            raise Busy(f"{self.running} of at most {self.capacity} choices are running or waiting; try again later")
        stream = Stream(len(choices))
        self._streams.add(stream)
        self._inbox.put(partial(self._begin, stream, choices))
        try:
            await stream.accepted
            yield stream
        finally:
            self._streams.discard(stream)
            self._inbox.put(partial(self._end, stream))

    def drop(self, stream: Stream, choice: int) -> None:
        """Cancel one choice of a request, which is complete for its reader."""
        if choice in stream.open:
            stream.open.remove(choice)
            self._inbox.put(partial(self._end, stream, only=choice))

    # In the thread:

    def _run(self) -> None:
        try:
            with self._make() as engine:
                self._post(self._started, engine.max_sequence, engine.max_requests)
                while self._obey(engine):
                    if steps := engine.step():
                        self._ahead.acquire()
                        self._post(self._deliver, [self._addressed(step) for step in steps])
        except BaseException as error:
            self._post(self._finished, error)
        else:
            self._post(self._finished, None)

    def _obey(self, engine: Engine) -> bool:
        """Do what the inbox says, waiting for it while there is nothing to run; False to end."""
        while True:
            try:
                order = self._inbox.get(block=engine.idle())
            except queue.Empty:
                return True
            if order is None:
                return False
            order(engine)

    def _begin(self, stream: Stream, choices: Sequence[tuple[Sequence[int], Sampling]], engine: Engine) -> None:
        for number, (prompt, sampling) in enumerate(choices):
            try:
                request = engine.add(prompt, sampling)
            except ValueError as error:
                self._end(stream, engine)
                self._post(stream.fail, Refused(str(error)))
                return
            self._owners[request] = stream, number
        self._post(self._accept, stream)

    def _end(self, stream: Stream, engine: Engine, *, only: int | None = None) -> None:
        for request, (owner, choice) in list(self._owners.items()):
            if owner is stream and only in (None, choice):
                del self._owners[request]
                engine.cancel(request)

    def _addressed(self, step: Step) -> tuple[Stream | None, int, Step]:
        """A step of a cancelled request is nobody's."""
        take = self._owners.get if step.finish is None else self._owners.pop
        stream, choice = take(step.request, (None, 0))
        return stream, choice, step

    def _post(self, call: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
            self._loop.call_soon_threadsafe(call, *arguments)

    # In the event loop:

    def _started(self, max_sequence: int, max_requests: int) -> None:
        self.max_sequence, self.max_requests = max_sequence, max_requests
        self._ready.set_result(None)

    def _accept(self, stream: Stream) -> None:
        if not stream.accepted.done():
            stream.accepted.set_result(None)

    def _deliver(self, steps: Sequence[tuple[Stream | None, int, Step]]) -> None:
        self._ahead.release()
        for stream, choice, step in steps:
            if stream is None or stream not in self._streams:
                continue
            stream.put(choice, step)
            if stream.overflows:
                stream.fail(TooSlow(f"the reader is {MOST_PENDING} steps behind"))
                self._inbox.put(partial(self._end, stream))

    def _finished(self, error: BaseException | None) -> None:
        self.error = error
        self.ended.set()
        if not self._ready.done():
            self._ready.set_exception(error or Closed("the engine has ended"))
        elif error is not None:
            logger.error("the engine failed: %s: %s", type(error).__name__, error)
            self.abort(Closed("the engine has failed"))
