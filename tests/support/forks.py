"""Processes that begin with Megatron imported: a server imports it once and forks for every job.

Importing takes a process four seconds of CPU. Only for a machine without a GPU: what is imported is in CPU mode.
"""

import atexit
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Done(NamedTuple):
    """The exit status, of several processes that of the first that failed, and what all printed."""

    returncode: int
    stdout: str
    stderr: str


def run_python(command: list[str], *, cwd: str | os.PathLike[str], timeout: float, threads: int = 1) -> Done:
    """`python COMMAND` in a process of its own, which begins anew with several threads and on a machine with a GPU."""
    if threads == 1 and not torch.cuda.is_available():
        return run_forked(command, cwd=cwd, timeout=timeout)
    run = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return Done(run.returncode, run.stdout, run.stderr)


def checked(run: Done) -> Done:
    """A run that succeeded; else its end is raised."""
    if run.returncode:
        raise AssertionError(f"exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}")
    return run


def run_forked(command: list[str], *, processes: int = 0, cwd: str | os.PathLike[str] = ".", timeout: float) -> Done:
    """As `python COMMAND` (a script, or -m and a module, and words) in `cwd`; with `processes`, that many ranks of it.

    Raises:
        TimeoutError: it took longer; it has been ended.
    """
    from support.ports import free_port  # the server, to which this file is a script, does without

    with tempfile.TemporaryDirectory() as logs:
        job = {
            "command": command, "processes": processes, "cwd": str(Path(cwd).resolve()), "logs": logs,
            "port": free_port(),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }  # fmt: skip
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise TimeoutError(f"{command}: not done after {timeout:g} s")
        answer = server.stdout.readline()
        assert answer, "the server that forks has ended; it says above why"
        status = json.loads(answer)
        stdout, stderr = ("".join(f.read_text() for f in sorted(Path(logs).glob(f"*.{n}"))) for n in ("out", "err"))
    return Done(status, stdout, stderr)


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def serve() -> None:
    """The server: a job a line on stdin, its exit status a line on stdout."""
    from megatron_carve.patches import cpu_mode

    cpu_mode.apply()
    import megatron_carve.run.task
    import megatron_carve.specs  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_all_ranks(json.loads(line))), flush=True)


def _all_ranks(job: dict[str, Any]) -> int:
    """Fork for every rank and wait; the others end when one fails."""
    running = {}
    for rank in range(max(job["processes"], 1)):
        pid = os.fork()
        if pid == 0:
            _be_rank(job, rank)
        running[pid] = rank
    failed = 0
    while running:
        pid, status = os.wait()
        del running[pid]
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failed


def _be_rank(job: dict[str, Any], rank: int) -> None:
    """In the new process: run the program and exit."""
    for descriptor, name in ((1, "out"), (2, "err")):
        log = os.open(f"{job['logs']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["processes"]:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    program, *words = job["command"]
    try:
        if program == "-m":
            sys.path.insert(0, job["cwd"])
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [program, *words]
            runpy.run_path(program, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    serve()
