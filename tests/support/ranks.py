"""Processes that stay and train run after run, as torchrun would each time: only the first pays for imports, for CUDA
and for kernels.

Also for GPUs, where support.forks, which forks processes that have imported, cannot go.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

# Seconds without a job after which they take whoever started them for gone.
PATIENCE = 900.0


class Ranks:
    """So many processes of one layout, which start with this and are ready when their first run is.

    Args:
        processes: how many; torchrun starts them, but for a single one.
        environment: added to theirs.
    """

    def __init__(self, processes: int, environment: Mapping[str, str]) -> None:
        self.size, self.jobs = processes, 0
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *(torchrun if processes > 1 else []), __file__, str(self.folder)],
                env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether they can train; a run that failed has ended them."""
        return self.process.poll() is None

    def train(self, folder: Path, *words: str, timeout: float) -> str:
        """`megatron_carve.train WORDS` in `folder`; what it printed. A failure raises with the end of that, and a run
        that takes longer than so many seconds is a failure."""
        from support.ports import free_port  # the processes, to which this file is a script, do without

        self.jobs += 1
        job = {"words": words, "folder": str(folder), "port": free_port()}
        written = self.folder / "job"
        written.write_text(json.dumps(job))
        written.rename(self.folder / f"{self.jobs}.json")
        end = time.monotonic() + timeout
        while len(list(self.folder.glob(f"{self.jobs}.*.done"))) < self.size:
            if not self.alive or time.monotonic() > end:
                self.end()
                raise AssertionError(f"{self._said()}\n{(self.folder / 'log').read_text(errors='replace')[-6000:]}")
            time.sleep(0.02)
        return self._said()

    def _said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in sorted(self.folder.glob(f"{self.jobs}.*.txt")))

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
    """A process of them: runs of jobs 1, 2 and so on of the folder."""
    from megatron_carve import train

    rank = os.environ.get("RANK", "0")
    for number in itertools.count(1):
        job = _wait_for(folder / f"{number}.json")
        if "RANK" in os.environ:
            # A run has a store of its own: in torchrun's the keys of the run before would still be there.
            os.environ |= {"MASTER_PORT": str(job["port"]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        os.chdir(job["folder"])
        log = (folder / f"{number}.{rank}.txt").open("w", buffering=1)
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if status := train.main(job["words"]):
                sys.exit(status)
        (folder / f"{number}.{rank}.done").touch()


def _wait_for(path: Path) -> dict:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            sys.exit("nobody has had a job any more")
        time.sleep(0.02)
    return json.loads(path.read_text())


if __name__ == "__main__":
    # While nobody waits for it.
    import megatron_carve.run.launch as launch
    from megatron_carve.run.session import choose_device

    choose_device(launch.use_device("auto"))
    import megatron_carve.run.pretraining  # noqa: F401

    serve(Path(sys.argv[1]))
