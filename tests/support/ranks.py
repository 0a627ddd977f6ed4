"""Processes that stay and run one program of ours after another, as torchrun would each time: only the first run pays
for imports, for CUDA and for kernels.

Also for GPUs, where support.forks, which forks processes that have imported, cannot go.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


class Ranks:
    """So many processes, which start with this and are ready when their first run is.

    Args:
        processes: how many; torchrun starts them, but for a single one.
        environment: added to theirs.
    """

    def __init__(self, processes: int, environment: Mapping[str, str]) -> None:
        self.size, self.runs = processes, 0
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with (self.folder / "start").open("w") as log:  # what they say outside of runs
            self.process = subprocess.Popen(
                [sys.executable, "-P", *(torchrun if processes > 1 else []), __file__, str(self.folder)],
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, bufsize=0,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether they can run more; a run that failed has ended them."""
        return self.process.poll() is None

    def train(self, folder: Path, *words: str, timeout: float) -> str:
        """`megatron_carve.train WORDS` in `folder`; what it printed, or raises, as of `wait`."""
        self.begin("train", words, folder, self.folder / "log")
        return self.wait(timeout)

    def begin(self, program: str, words: Sequence[str], folder: Path, log: Path) -> None:
        """Have them run `megatron_carve.PROGRAM WORDS` in `folder`; what they print goes to the file `log`."""
        from support.ports import free_port  # the processes, to which this file is a script, do without

        self.runs, self.log = self.runs + 1, log
        log.write_text("")
        job = {"run": self.runs, "program": program, "words": words, "folder": str(folder), "log": str(log)}
        (self.folder / "job.json").write_text(json.dumps({**job, "port": free_port()}))
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # they have ended, as wait() says
            self.process.stdin.write(b"." * self.size)

    def wait(self, timeout: float) -> str:
        """What the run has printed.

        Raises:
            RuntimeError: with the end of that; it failed, or takes longer than so many seconds, and they have ended.
        """
        end = time.monotonic() + timeout
        while len(list(self.folder.glob(f"{self.runs}.*.done"))) < self.size:
            late = time.monotonic() > end
            if late or not self.alive:
                self.end()
                started, said = (path.read_text(errors="replace") for path in (self.folder / "start", self.log))
                why = f"error: not done after {timeout:.0f} s" if late else ""
                raise RuntimeError(f"{started[-2000:]}\n{said[-6000:]}\n{why}")
            time.sleep(0.02)
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Their end, in the middle of a run too."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(45)  # torchrun gives them 30
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def serve(folder: Path) -> None:
    """A process of them: a run for each byte on standard input, which ends with whoever started them."""
    rank = os.environ.get("RANK", "0")
    while os.read(0, 1):
        job = json.loads((folder / "job.json").read_text())
        if "RANK" in os.environ:
            # A run has a store of its own: in torchrun's the keys of the run before would still be there.
            os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        os.chdir(job["folder"])
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):  # what is not Python writes there too
            os.dup2(log, descriptor)
        os.close(log)
        if status := importlib.import_module(f"megatron_carve.{job['program']}").main(job["words"]):
            sys.exit(status)
        forget()
        (folder / f"{job['run']}.{rank}.done").touch()


def forget() -> None:
    """As if nothing had run: others get the GPU's memory, and functions are compiled for the next model's shapes, not
    for whatever shape there may be or, after some models, not at all. What is compiled is on disk."""
    import torch

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron's handler waits for the end of a step
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        print(f"tensors that stay on this GPU: {torch.cuda.memory_allocated() / 2**20:.0f} MiB")


if __name__ == "__main__":
    # While nobody waits for it.
    import megatron_carve.run.launch as launch
    from megatron_carve.run.session import choose_device

    choose_device(launch.use_device("auto"))
    import megatron_carve.run.pretraining  # noqa: F401

    serve(Path(sys.argv[1]))
