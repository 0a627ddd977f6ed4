"""Of a run that is killed no process stays that holds its output open."""

import pickle
import subprocess
import sys

import pytest

from megatron_carve.patches import saving_processes
from megatron_carve.patches.saving_processes import mortal_loop

RUN = """
import time
from megatron_carve.patches import saving_processes

if __name__ == "__main__":
    saving_processes.apply()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue({mode!r}).put(1)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_server_of_a_killed_run_ends(tmp_path):
    for mode in ("spawn", "fork"):
        program = tmp_path / f"{mode}.py"
        program.write_text(RUN.format(mode=mode))
        run = subprocess.Popen([sys.executable, "-P", program], stdout=subprocess.PIPE, text=True)
        assert run.stdout.readline() == "ready\n"
        run.kill()
        run.communicate(timeout=60)  # until nobody has the output open


def test_the_persistent_worker_ends_with_its_run_too():
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    saving_processes.apply()
    try:
        assert pickle.loads(pickle.dumps(PersistentAsyncCaller.async_loop)) is mortal_loop
    finally:
        saving_processes.revert()
    assert PersistentAsyncCaller.async_loop is not mortal_loop
