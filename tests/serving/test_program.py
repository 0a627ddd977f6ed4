"""The program `serve`: what it says of mistakes, before a model is loaded."""

import json
import socket
import subprocess
import sys

from support.programs import assert_complaints

from megatron_carve import serve

WITHOUT = """
import sys
sys.modules["aiohttp"] = None
from megatron_carve.serve import main
sys.exit(main(["no_run"]))
"""


def test_mistakes_are_said_in_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_complaints(
            tmp_path,
            "serve",
            [
                (["run", "--port", "70000"], "--port: expected 0 to 65535, got 70000"),
                (
                    ["run", "--port", port],
                    f"--host, --port: cannot listen on 127.0.0.1 port {port}: Address already in",
                ),
                (["run", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid port 8000: "),
                (["run", "--queue", "-1"], "--queue: expected at least 0, got -1"),
                (["run", "--max-requests", "0"], "--max-requests: expected at least 1, got 0"),
                (["run", "--step-tokens", "64"], "--step-tokens: expected more than --max-requests 64, got 64"),
                (["run", "--max-sequence", "1"], "--max-sequence: expected at least 2, got 1"),
                (["run", "--timeout", "0"], "--timeout: expected seconds above 0, got 0.0"),
                (["run", "--grace", "nan"], "--grace: expected seconds of at least 0, got nan"),
            ],
        )


def test_its_limits_are_those_of_the_engine():
    from megatron_carve.use import engine

    assert (serve.MAX_REQUESTS, serve.STEP_TOKENS) == (engine.MAX_REQUESTS, engine.MAX_TOKENS)


def test_without_its_libraries_it_says_what_to_install(tmp_path):
    run = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: serving needs aiohttp (")
    assert line.endswith('; run: pip install "megatron-carve[serve]"')


def test_none_of_it_needs_the_libraries_until_it_serves():
    """Nor the other programs: an installation without the extra has them not."""
    names = ["aiohttp", "pydantic", "prometheus_client"]
    code = f"""
import json, sys
import megatron_carve.serve, megatron_carve.use.continuation
print(json.dumps([name for name in {names!r} if name in sys.modules]))
"""
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []
