"""What checksums add to saving a run's checkpoint and to going on from it.

    python tests/benchmarks/bench_checkpoints.py OUT [RECIPE] [section.key=value ...]

Trains RECIPE (carve_1p3b_hybrid) for a step, saves, and in another process goes on for a second, in folders of OUT (on
the storage to measure). Prints, and keeps in OUT/results.json, seconds of Megatron's saving and loading, those that
checksums took of a save, those that they took beside the start of the second process, and those that it then waited for
them. What is loaded is in the page cache: from a disk loading takes longer, and checksums as long as that once more at
most, where memory does not hold the checkpoint.
"""

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SAVE, OF_A_SAVE = "save", "checksums of a save"
LOAD, OF_A_LOAD, WAIT = "load", "checksums of a load", "wait for the checksums of a load"

seconds: dict[str, float] = {}


def timed(name: str, work: Any) -> Any:
    def timing(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start

    return timing


def train(words: list[str]) -> dict[str, float]:
    """Seconds that each of the names took in a training run."""
    from megatron_carve import checksums
    from megatron_carve import train as program
    from megatron_carve.patches import Patch, Replacement
    from megatron_carve.run import preflight
    from megatron_carve.run.folder import RunFolder

    data_check, prepare = RunFolder.data_check, preflight.prepare

    @contextlib.contextmanager
    def timed_check(*args: Any, **options: Any) -> Iterator[Any]:
        with data_check(*args, **options) as wait:
            yield timed(WAIT, wait)

    def prepare_and_time(*args: Any) -> Any:
        """Megatron is imported by then: that is what its loading is timed without, and checksums beside."""
        prepared = prepare(*args)
        from megatron_carve.run import pretraining

        patch_megatron = pretraining.patch_megatron
        pretraining.patch_megatron = lambda listener: (patch_megatron(listener), timing.apply())  # type: ignore[assignment,return-value]
        return prepared

    timing = Patch("timing", "", "", "", [
        Replacement("megatron.training.training:save_checkpoint", lambda original: timed(SAVE, original)),
        Replacement("megatron.training.training:load_checkpoint", lambda original: timed(LOAD, original)),
    ])  # fmt: skip
    checksums.write_list = timed(OF_A_SAVE, checksums.write_list)
    checksums.check = timed(OF_A_LOAD, checksums.check)
    RunFolder.data_check = timed_check  # type: ignore[method-assign, assignment]
    preflight.prepare = prepare_and_time
    if status := program.main(words):
        raise SystemExit(status)
    return seconds


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out, recipe, *words = Path(sys.argv[1]), *(sys.argv[2:] or ["carve_1p3b_hybrid"])
    given = [
        recipe, f"run.folder={out}", "run.name=run", "checkpoint.interval=1", "training.tokens=null",
        "training.micro_batch_size=1", "training.global_batch_size=1", "training.eval_iters=1", *words,
    ]  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = [pool.submit(train, [*given, f"training.steps={steps}"]).result() for steps in (1, 2)]
    size = sum(file.stat().st_size for file in (out / "run" / "checkpoints" / "iter_0000002").iterdir())
    saved, loaded = runs[0][SAVE] - runs[0][OF_A_SAVE], runs[1][LOAD]
    print(f"save of {size / 1e9:.2f} GB: {saved:.2f} s, checksums {runs[0][OF_A_SAVE] / saved:.1%} more")
    print(
        f"load of it: {loaded:.2f} s; checksums {runs[1][OF_A_LOAD]:.2f} s while the program starts, then waited for "
        f"{runs[1][WAIT]:.2f} s ({runs[1][WAIT] / loaded:.1%} more)"
    )
    result = {"recipe": recipe, "checkpoint_bytes": size, "seconds": runs}
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
