"""What checksums add to saving a run's checkpoint and to going on from it.

    python tests/benchmarks/bench_checkpoints.py OUT [RECIPE] [section.key=value ...]

Trains RECIPE (carve_1p3b_hybrid) for a step, saves, and goes on for a second, in folders of OUT (on the storage to
measure). Prints, and keeps in OUT/results.json, seconds of Megatron's saving and loading and those that
checksums took of them or before them. What is loaded is in the page cache: from a disk loading takes longer, and
checksums as long as that once more at most, where memory does not hold the checkpoint.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron_carve import checksums, train
from megatron_carve.patches import Patch, Replacement

seconds: dict[str, list[float]] = {}


def timed(name: str, work: Any) -> Any:
    def timing(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return work(*args, **kwargs)
        finally:
            seconds.setdefault(name, []).append(time.monotonic() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)

    return timing


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    out, recipe, *words = Path(sys.argv[1]), *(sys.argv[2:] or ["carve_1p3b_hybrid"])
    checksums.write_list, checksums.check = (  # type: ignore[assignment]
        timed("checksums of a save", checksums.write_list),
        timed("checksums of a load", checksums.check),
    )
    timing = Patch("timing", "", "", "", [
        Replacement("megatron.training.training:save_checkpoint", lambda original: timed("save", original)),
        Replacement("megatron.training.training:load_checkpoint", lambda original: timed("load", original)),
    ])  # fmt: skip
    given = [
        recipe, f"run.folder={out}", "run.name=run", "checkpoint.interval=1", "training.tokens=null",
        "training.micro_batch_size=1", "training.global_batch_size=1", "training.eval_iters=1", *words,
    ]  # fmt: skip
    from megatron_carve.run import pretraining

    patch_megatron = pretraining.patch_megatron
    pretraining.patch_megatron = lambda listener: (patch_megatron(listener), timing.apply())  # type: ignore[assignment,return-value]
    for steps in (1, 2):
        if train.main([*given, f"training.steps={steps}"]):
            sys.exit(1)
    checkpoint = out / "run" / "checkpoints" / "iter_0000002"
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    result: dict[str, Any] = {"recipe": recipe, "checkpoint_bytes": size, "seconds": seconds}
    # Each save writes the list of its process and that of all; loading compares the small files apart and again.
    for what, times in (("save", 2), ("load", 1)):
        spent = sum(seconds[f"checksums of a {what}"]) / times
        whole = sum(seconds[what]) / times - (spent if what == "save" else 0.0)
        result[what] = {"seconds_without": whole, "seconds_of_checksums": spent, "added": spent / whole}
        print(f"{what} of {size / 1e9:.2f} GB: {whole:.2f} s, checksums {spent:.2f} s more ({spent / whole:.1%})")
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
