"""Run the training program as a user does, in a process of its own."""

from pathlib import Path

from support.forks import Done, checked, run_forked, run_python

from megatron_carve.run.progress import read_metrics


def train(folder: Path, *words: str, threads: int = 1, check: bool = True, timeout: float = 560) -> Done:
    """`python -m megatron_carve.train WORDS` in `folder`; a failure raises with what it printed."""
    command = ["-m", "megatron_carve.train", *words]
    run = run_python(command, cwd=folder, timeout=timeout, threads=threads)
    return checked(run) if check else run


def train_on_text(folder: Path, recipe: str, text: str, *words: str) -> Path:
    """Train a recipe, as tiny.yaml, on a text, as cats.txt, both written into `folder`, which is returned."""
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "cats.txt").write_text(text)
    train(folder, "tiny.yaml", *words)
    return folder


def train_ranks(processes: int, folder: Path, *words: str) -> Done:
    """As train, in several processes of one layout, as torchrun would start them."""
    command = ["-m", "megatron_carve.train", *words]
    return checked(run_forked(command, processes=processes, cwd=folder, timeout=560))


def losses(folder: Path, name: str) -> dict[int, float]:
    """Training loss by step of the run `name` that was started in `folder`."""
    return {r["step"]: r["loss"] for r in read_metrics(folder / "runs" / name / "metrics.jsonl") if "loss" in r}
