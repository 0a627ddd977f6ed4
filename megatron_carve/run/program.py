"""What the programs share: how they speak, how they end, and that nothing of them is left behind."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from megatron_carve.run.full_disk import full_disk
from megatron_carve.run.session import session
from megatron_carve.run.stopping import Stopped


def run_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The parser of a program that works with a trained model: which run, and which of its checkpoints."""
    parser = argparse.ArgumentParser(prog=f"python -m megatron_carve.{program}", description=description)
    parser.add_argument("run", help="folder of the run, with recipe.yaml and checkpoints/ in it")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest)")
    return parser


def exit_status[T](
    work: Callable[[], T], then: Callable[[T], int | None] | None = None, *, log: TextIO | None = None
) -> int:
    """Do the work of a program, in a session of its own.

    Args:
        work: what may meet a user's mistake, that is, any ValueError, OSError, ImportError, NotImplementedError or
            PatchError. It is said in one line on stderr, by one process of a node.
        then: is given what `work` returned. What it raises is nobody's mistake and passes.
        log: where our notices go; standard error if None, since standard output is for the answer.

    Returns:
        0, or what `then` returned; 2 for a mistake; 1 where the disk is full, in one line too; as a shell would say,
        130 interrupted from the keyboard, 143 stopped by SIGTERM, 141 where nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):  # where they take no UTF-8, other characters are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with session():
            with _quiet():
                _configure_log(log or sys.stderr)
                try:
                    _require_utf8(sys.argv[1:])
                    result = work()
                except (ValueError, OSError, ImportError, RuntimeError) as error:
                    if full_disk(error) or not _is_mistake(error):
                        raise
                    if os.environ.get("LOCAL_RANK", "0") == "0":  # every process of a node finds the same mistake
                        print(f"error: {error}", file=sys.stderr)
                    return 2
            status = 0 if then is None else then(result) or 0
            sys.stdout.flush()
            return status
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped.message, file=sys.stderr)
        assert isinstance(stopped.code, int)
        return stopped.code
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails too
        return 141
    except Exception as error:
        if not (full := full_disk(error)):
            raise
        print(f"error: {full}", file=sys.stderr)
        return 1


def _require_utf8(words: Sequence[str]) -> None:
    """Names of files and runs come and go as UTF-8; otherwise they would be kept as what they are not."""
    if sys.getfilesystemencoding() != "utf-8" and (other := next((w for w in words if not w.isascii()), None)):
        word = os.fsencode(other).decode("utf-8", errors="backslashreplace")
        raise ValueError(f"{word}: beyond ASCII, where Python uses no UTF-8; set PYTHONUTF8=1 in the environment")


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):
        return False
    if not isinstance(error, RuntimeError):
        return True
    from megatron_carve.patches import PatchError  # here because it imports torch, which takes seconds

    return isinstance(error, NotImplementedError | PatchError)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron warns of every optional package, which our log says once."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class LogHandler(logging.StreamHandler):
    """Silent where nobody reads any more, as of `| head`, or a disk is full; logging would report it for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def _configure_log(stream: TextIO) -> None:
    """Our notices go to rank 0's console, one line each."""
    logger = logging.getLogger("megatron_carve")
    logger.handlers.clear()
    handler = LogHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False
    # It warns where a CUDA compiler is installed and no GPU is, which concerns nothing here.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of fonts, where Megatron lets INFO through
