"""Two torchrun agents on one machine, as on two nodes: one of their workers is killed while they train, and the same
commands go on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from support.ports import free_port

AGENTS = 2
# Seconds after a kill until those are killed that still run; both have to end in 60.
PATIENCE = 180
SAYS_WHERE = {"PYTHONFAULTHANDLER": "1"}  # of each thread, when it is aborted


class Agents:
    """Both agents, each with one worker that trains; what they print is in agent0.log and agent1.log of the folder.

    Args:
        folder: where they run.
        words: of the training program.
        environments: added to the environment, by agent.
    """

    def __init__(self, folder: Path, words: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-id=1", endpoint]
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={AGENTS}", "--nproc-per-node=1", *rendezvous,
            "-m", "megatron_carve.train", *words,
        ]  # fmt: skip
        self.logs = [folder / f"agent{i}.log" for i in range(AGENTS)]
        self.processes = []
        for log, environment in zip(self.logs, environments, strict=True):
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **SAYS_WHERE, **environment},
                        stdout=out, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip

    def kill_a_worker(self) -> None:
        """That of the second agent, with -9."""
        children = psutil.Process(self.processes[1].pid).children()
        (worker,) = (child for child in children if "megatron_carve.train" in child.cmdline())
        worker.send_signal(signal.SIGKILL)

    def wait(self, seconds: float) -> list[int]:
        """Their exit statuses. What is left of them after so many seconds says where it is and is killed, and
        TimeoutExpired is raised."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.0, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self._abort()
            raise
        finally:
            self.end()

    def end(self) -> None:
        """Kill those that still run, with their workers."""
        for process in self.processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()

    def _abort(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                children = psutil.Process(process.pid).children()
                for child in children:
                    child.send_signal(signal.SIGABRT)
                psutil.wait_procs(children, timeout=10)

    def said(self, agent: int) -> str:
        return self.logs[agent].read_text()


def train_with_a_kill(
    folder: Path, words: Sequence[str], environments: Sequence[Mapping[str, str]], *, start: float = 300
) -> None:
    """Train `run.name=run` of `words` with two agents; at its first checkpoint kill a worker; start both again.

    Args:
        start: seconds until the first checkpoint, and for what is left after it, at most.
    """
    words = [*words, "run.name=run"]
    agents = Agents(folder, words, environments)
    tracker = folder / "runs/run/checkpoints/latest_checkpointed_iteration.txt"
    end = time.monotonic() + start
    try:
        while not tracker.exists():
            assert all(process.poll() is None for process in agents.processes), agents.said(0) + agents.said(1)
            assert time.monotonic() < end, "no checkpoint in time: " + agents.said(0)
            time.sleep(0.1)
        killed = time.monotonic()
        agents.kill_a_worker()
    except BaseException:
        agents.end()
        raise
    try:
        statuses = agents.wait(PATIENCE)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"{late}\n{agents.said(0)}\n{agents.said(1)}") from None
    took = time.monotonic() - killed
    print(f"both agents ended {took:.1f} s after the kill")
    assert took < 60, agents.said(0) + agents.said(1)
    assert all(statuses), statuses
    closing = [agents.said(i).rpartition("Root Cause")[2] for i in range(AGENTS)]
    assert "Signal 9 (SIGKILL)" in closing[1], closing[1]
    print("the other agent's closing words:", *closing[0].strip().splitlines()[-3:], sep="\n  ")
    # Its worker's, whose peer is gone; over NCCL torch aborts that, after it has said why.
    aborted = "SIGABRT" in closing[0] and "remote process exited" in agents.said(0)
    assert aborted or "Error" in closing[0], agents.said(0)
    again = Agents(folder, words, environments)
    statuses = again.wait(start)
    assert statuses == [0, 0], again.said(0) + again.said(1)
    assert "resuming at step" in again.said(0) + again.said(1)  # of the agent that has the first rank
