"""One byte cut, or changed, in each kind of file of a run: noticed, named in one line, and nothing written over."""

import errno
import shutil
from threading import Event

import pytest
from support.forks import run_forked
from support.programs import in_turn, program
from support.train import train, train_ranks

from megatron_carve import checksums
from megatron_carve.run import folder as folders
from megatron_carve.run.folder import RunFolder
from megatron_carve.run.full_disk import full_disk

pytestmark = pytest.mark.slow

TINY = """
inherit: debug
model: {pattern: C-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 1}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 4, seq_length: 64, micro_batch_size: 2, global_batch_size: 4, eval_interval: 4, eval_iters: 1}
checkpoint: {interval: 2}
run: {log_interval: 1}
"""
WORDS = ["tiny.yaml", "data.text=cats.txt"]
CHECKPOINT = "checkpoints/iter_0000004"
FILES = [
    "recipe.yaml", "checkpoints/latest_checkpointed_iteration.txt",
    *(f"{CHECKPOINT}/{name}" for name in ("__0_0.distcp", ".metadata", "metadata.json", checksums.LIST)),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "cats.txt").write_text("the cat sat on the mat, and then it sat again.\n" * 200)
    train(folder, *WORDS, "run.name=whole")
    return folder


def cut(data, place):
    return data[:place] + data[place + 1 :]


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.fixture(scope="module")
def ends(folder):
    """What a run says that goes on with a damaged file, and whether it left all files as they were."""
    cases = {}
    for file in FILES:
        size = (folder / "runs/whole" / file).stat().st_size
        for damage in (cut, flip):
            for place in {0, size // 2, size - 1}:
                name = f"{len(cases)}"
                run = folder / "runs" / name
                shutil.copytree(folder / "runs/whole", run)
                (run / file).write_bytes(damage((run / file).read_bytes(), place))
                cases[file, damage, place] = name, contents(run)
    done = in_turn(folder, "train", [[*WORDS, f"run.name={name}", "training.steps=6"] for name, _ in cases.values()])
    return [
        (file, damage, place, end, contents(folder / "runs" / name) == before)
        for ((file, damage, place), (name, before)), end in zip(cases.items(), done, strict=True)
    ]


def contents(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut, flip])
def test_damage_is_noticed_named_and_left_as_it_is(ends, file, damage):
    found = [(place, end, kept) for f, d, place, end, kept in ends if (f, d) == (file, damage)]
    assert found
    for place, end, kept in found:
        assert end.returncode == 2, f"byte {place}: {end}"
        assert kept, f"byte {place}"
        last = end.stderr.splitlines()[-1]
        named = "iter_" if "latest" in file and damage is flip else file.rpartition("/")[2]
        assert last.startswith("error: runs/") and named in last, f"byte {place}: {last}"


def test_programs_that_use_a_run_see_it_too(folder):
    run = folder / "runs" / "used"
    shutil.copytree(folder / "runs/whole", run)
    data = run / CHECKPOINT / "__0_0.distcp"
    data.write_bytes(flip(data.read_bytes(), 5000))
    done = program(folder, "generate", "runs/used", "--prompt", "the", check=False)
    assert done.returncode == 2 and "__0_0.distcp is damaged: its checksum" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_checkpoint_without_checksums_and_one_that_the_tracker_passes_over_are_said(folder):
    run = folder / "runs" / "earlier"
    shutil.copytree(folder / "runs/whole", run)
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("2")
    (run / "checkpoints/iter_0000002" / checksums.LIST).unlink()
    recipe = (run / "recipe.yaml").read_text().partition("\n")[2]
    (run / "recipe.yaml").write_text("# The resolved recipe of this run.\n" + recipe)
    out = train(folder, *WORDS, "run.name=earlier", "training.steps=3").stdout
    assert "names step 2; newer checkpoints (4) are passed over and replaced" in out
    assert out.count("the checkpoint has no checksums") == 1 and "step 3/3" in out


FILLS_THE_DISK = """
import resource, sys
from megatron_carve import train
from megatron_carve.run import progress

on_step = progress.Progress.on_step

def fills(self, iteration, *rest):
    on_step(self, iteration, *rest)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # which stands for it, with an error of its own

if __name__ == "__main__":
    progress.Progress.on_step = fills
    sys.exit(train.main(sys.argv[1:]))
"""


def test_a_full_disk_ends_a_run_in_one_line(folder):
    (folder / "fills.py").write_text(FILLS_THE_DISK)
    run = run_forked([str(folder / "fills.py"), *WORDS, "run.name=full"], cwd=folder, timeout=300)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "error: runs/full/checkpoints/iter_0000002/__0_0.distcp: File too large; what was being written is not whole, "
        "what was there before is"
    )
    assert "Traceback" not in run.stderr and "rank 0 failed" not in run.stderr


def test_a_full_disk_is_found_among_what_an_error_came_of():
    def raised(error, cause):
        try:
            raise error from cause
        except Exception as found:
            return found

    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert full_disk(raised(ValueError("x"), raised(RuntimeError("y"), full))).startswith("runs/a: No space left on")
    assert full_disk(RuntimeError("No space left on device (os error 28)")).startswith("No space left on device; ")
    assert full_disk(raised(ValueError("x"), OSError(errno.EACCES, "no"))) is None


@pytest.mark.long
def test_processes_write_and_check_their_parts(folder):
    """Saved beside training, by two processes; then one byte of each one's file is another."""
    words = [*WORDS, "run.name=two", "megatron.async_save=true", "megatron.async_strategy=mcore"]
    train_ranks(2, folder, *words)
    run = folder / "runs/two" / CHECKPOINT
    files = checksums.read_list(run)
    data = sorted(p.name for p in run.glob("*.distcp"))
    assert sorted(files) == sorted([".metadata", "metadata.json", *data]) and len(data) == 2
    assert not list(run.glob(checksums.OF_A_PROCESS.format("*")))
    for name in data:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(flip(whole, len(whole) // 2))
        with pytest.raises(AssertionError, match=rf"error: .*{name} is damaged"):
            train_ranks(2, folder, *words, "training.steps=6")
        (run / name).write_bytes(whole)
    train_ranks(2, folder, *words, "training.steps=5")


class TestChecksums:
    def test_only_what_counts_is_compared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checksums, "BLOCK_BYTES", 10)
        (tmp_path / "a").write_bytes(bytes(range(95)))
        checksums.write_list(tmp_path, ["a"])
        files = checksums.read_list(tmp_path)
        assert files["a"]["bytes"] == 95 and len(files["a"]["crc32"]) == 10
        (tmp_path / "a").write_bytes(flip(bytes(range(95)), 47))
        checksums.check(tmp_path, files, {"a": [(0, 40), (50, 95)]})
        with pytest.raises(checksums.Damaged, match="a is damaged: its checksum is another after byte 40"):
            checksums.check(tmp_path, files, {"a": [(49, 50)]})
        found = []
        for part in range(3):
            try:
                checksums.check(tmp_path, files, {"a": None}, (part, 3))
            except checksums.Damaged:
                found.append(part)
        assert found == [1]
        stop = Event()
        stop.set()
        checksums.check(tmp_path, files, {"a": None}, stop=stop)

    def test_what_cannot_be_read_is_for_who_waits(self, tmp_path, monkeypatch):
        def unreadable(*args):
            raise OSError(errno.EIO, "Input/output error")

        for what in ("_data", "_compare"):
            with monkeypatch.context() as patched:
                patched.setattr(folders, "_data", lambda *args: {})
                patched.setattr(folders, what, unreadable)
                with RunFolder(tmp_path).data_check(1) as wait, pytest.raises(OSError, match="Input/output"):
                    wait()

    def test_files_that_are_gone_or_not_in_the_list(self, tmp_path):
        (tmp_path / "a").write_bytes(b"")
        checksums.write_list(tmp_path, ["a"])
        files = checksums.read_list(tmp_path)
        checksums.check(tmp_path, files, {"a": None})
        with pytest.raises(checksums.Damaged, match=r"b is not in checksums\.txt"):
            checksums.check(tmp_path, files, {"b": None})
        (tmp_path / "a").unlink()
        with pytest.raises(checksums.Damaged, match="a is missing"):
            checksums.check(tmp_path, files, {"a": None})
