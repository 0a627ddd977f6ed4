"""Run the package's programs as a user does, in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support.forks import Done, checked, run_python

EACH_IN_TURN = """
import contextlib, importlib, io, json, sys

main = importlib.import_module(sys.argv[1]).main
results = []
for words in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except BaseException as error:
            raise RuntimeError(f"{words}: {err.getvalue()}") from error
    results.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def program(folder: Path, name: str, *words: str, check: bool = True) -> Done:
    """`python -m megatron_carve.NAME WORDS` in `folder`; a failure raises with what it printed."""
    run = run_python(["-m", f"megatron_carve.{name}", *words], cwd=folder, timeout=300)
    return checked(run) if check else run


def in_turn(folder: Path, name: str, cases: Sequence[Sequence[str]]) -> list[Done]:
    """The program with the words of every case, one after another in one process: for ends before Megatron begins."""
    run = subprocess.run(
        [sys.executable, "-c", EACH_IN_TURN, f"megatron_carve.{name}", json.dumps(cases)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if run.returncode:
        raise AssertionError(f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    return [Done(*result) for result in json.loads(run.stdout.splitlines()[-1])]


def assert_complaints(folder: Path, name: str, cases: Sequence[tuple[Sequence[str], str]]) -> None:
    """Every case ends with status 2, nothing on standard output, and as the last line of stderr its complaint."""
    for (words, complaint), done in zip(cases, in_turn(folder, name, [words for words, _ in cases]), strict=True):
        last = done.stderr.rstrip().splitlines()[-1]
        assert (done.returncode, done.stdout) == (2, ""), f"{words}: {done}"
        assert last.startswith("error: ") and complaint in last, f"{words}: {last}"
