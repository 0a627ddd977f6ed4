"""A launch starts the compiled kernel that Triton would have chosen, also where it does not ask for it again."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support/compare_launches.py"


def test_remembered_launches_are_tritons(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
