"""Every mistake a user can make ends in one line on stderr and exit status 2, before a model is built.

All cases run one after another in a process of their own, which imports Megatron once: as a script this file is that
process, as a module it is the tests of what the process saw.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SMALL = """\
model: {pattern: C-*-, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4, attention_window: 32}
mixer: {num_key_heads: 4, num_value_heads: 4, key_head_dim: 8, value_head_dim: 8, content_rank: 4}
data: {recall: {num_pairs: 4}}
training: {steps: 10, seq_length: 64, global_batch_size: 4, precision: fp32}
run: {device: cpu}
"""
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@dataclass(frozen=True)
class Case:
    """What a user types, and what must come of it.

    Args:
        words: after `python -m megatron_carve.train`.
        says: parts of the one line on stderr, in order; none where another process says it.
        files: besides small.yaml.
        setup: prepares the working directory further.
        env: added to an environment without torchrun's variables.
        leaves: beginnings of the new files' names, where the mistake shows only when work has begun.
        bar: a progress bar comes before the line.
    """

    words: str
    says: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    setup: Callable[[], object] | None = None
    env: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    bar: bool = False


def inherited(text: str) -> dict[str, str]:
    return {"mine.yaml": "inherit: small.yaml\n" + text}


def save_checkpoint(*overrides: str, name: str = "small") -> Path:
    """A run with a checkpoint at step 5; returns the checkpoint's data file."""
    import torch

    from megatron_carve.recipe import load_recipe
    from megatron_carve.run.folder import RunFolder

    folder = RunFolder(Path("runs") / name)
    folder.save_recipe(load_recipe("small.yaml", overrides))
    place = folder.checkpoints / "iter_0000005"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"weight": torch.ones(500)}, checkpoint_id=place, no_dist=True)
    (place / "metadata.json").write_text("{}")
    (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("5")
    (data,) = place.glob("*.distcp")
    return data


def save_damaged_checkpoint() -> None:
    data = save_checkpoint()
    data.write_bytes(data.read_bytes()[:100])


def save_checkpoint_without_recipe() -> None:
    save_checkpoint()
    Path("runs/small/recipe.yaml").unlink()


CASES = {
    # The recipe itself.
    "unknown recipe": Case("gdn3_1p3b", ("command line: no recipe 'gdn3_1p3b'", "carve_1p3b_hybrid")),
    "missing file": Case("nowhere/mine.yaml", ("command line: no recipe 'nowhere/mine.yaml'", "neither a file")),
    "a folder": Case("folder.yaml", ("no recipe 'folder.yaml'",), setup=lambda: Path("folder.yaml").mkdir()),
    "YAML syntax": Case("mine.yaml", ("mine.yaml: not valid YAML", "line 1"), {"mine.yaml": "model: {pattern: C-\n"}),
    "not a mapping": Case("mine.yaml", ("mine.yaml: expected sections", "got ['C-']"), {"mine.yaml": "- C-\n"}),
    "empty file": Case("mine.yaml", ("mine.yaml: expected sections", "got None"), {"mine.yaml": ""}),
    "duplicate key": Case(
        "mine.yaml", ("mine.yaml: line 3: key 'run' appears twice",), inherited("run: {name: a}\nrun: {name: b}\n")
    ),
    "a key that is a list": Case(
        "mine.yaml", ("mine.yaml: line 1: expected a name as key, got ['a', 'b']",), {"mine.yaml": "? [a, b]\n: c\n"}
    ),
    "missing parent": Case("mine.yaml", ("mine.yaml: no recipe 'gone'",), {"mine.yaml": "inherit: gone\n"}),
    "inherits from itself": Case("mine.yaml", ("inherits from itself",), {"mine.yaml": "inherit: mine.yaml\n"}),
    "required key": Case("mine.yaml", ("mine.yaml: model.pattern: required",), {"mine.yaml": "training: {steps: 1}\n"}),
    # Keys.
    "misspelt section": Case(
        "mine.yaml", ("mine.yaml: unknown key trainning; did you mean training?",), inherited("trainning: {lr: 1}\n")
    ),
    "misspelt key in a file": Case(
        "mine.yaml", ("mine.yaml: unknown key training.lrr; did you mean training.lr?",),
        inherited("training: {lrr: 1}\n"),
    ),
    "misspelt key on the command line": Case(
        "small.yaml mixer.content_rang=4", ("command line: unknown key mixer.content_rang", "mixer.content_rank?")
    ),
    "not an override": Case("small.yaml --steps 3", ("command line: expected section.key=value, got '--steps'",)),
    # Types and ranges.
    "wrong type in a file": Case(
        "mine.yaml", ("mine.yaml: training.seq_length: expected an integer, got 'long'",),
        inherited("training: {seq_length: long}\n"),
    ),
    "wrong type on the command line": Case(
        "small.yaml training.lr=fast", ("command line: training.lr: expected a number, got 'fast'",)
    ),
    "wrong choice": Case("small.yaml training.precision=fp8", ("training.precision: expected one of bf16", "'fp8'")),
    "out of range": Case("small.yaml training.lr=-1", ("training.lr: expected a number above 0, got -1",)),
    "any mistake, on another process": Case(
        "small.yaml training.lr=-1", (), env={**TORCHRUN, "RANK": "1", "LOCAL_RANK": "1"}
    ),
    "unknown layer symbol": Case("small.yaml model.pattern=C-X-", ("model.pattern: expected letters of", "'X'")),
    "different prediction heads": Case(
        "small.yaml model.pattern=C-/C-/2-", ("model.pattern: expected the same layers", "after every /")
    ),
    "seed": Case("small.yaml training.seed=0", ("training.seed: expected above 0 and below 2**32, got 0",)),
    "odd heads with rope": Case(
        "small.yaml model.attention_head_dim=15", ("model.attention_head_dim: expected an even number with rope",)
    ),
    "empty stage": Case("small.yaml model.pattern=C-||*-", ("model.pattern: expected layers on both sides",)),
    "run name with a slash": Case("small.yaml run.name=a/b", ("run.name: expected a file name", "'a/b'")),
    # Sizes that do not fit each other.
    "indivisible attention heads": Case(
        "small.yaml model.hidden_size=66 model.num_attention_heads=4",
        ("model.num_attention_heads: expected a divisor of hidden_size=66", "got 4"),
    ),
    "query groups": Case("small.yaml model.num_query_groups=3", ("model.num_query_groups: expected a", "got 3")),
    "mixer heads for tensor parallel": Case(
        "small.yaml parallel.tensor=8",
        ("parallel.tensor: tensor parallel size 8 does not divide num_key_heads=4", "legal sizes: 1, 2, 4"),
    ),
    "value heads": Case(
        "small.yaml mixer.num_value_heads=6", ("mixer.num_value_heads: expected a multiple of num_key_heads=4, got 6",)
    ),
    "content chunk": Case(
        "small.yaml mixer.content_chunk=100", ("mixer.content_chunk: expected a positive multiple of 64, got 100",)
    ),
    "steps and tokens": Case(
        "mine.yaml", ("mine.yaml: training.steps: expected exactly one of steps and tokens, got both",),
        {"mine.yaml": SMALL.replace("steps: 10", "steps: 10, tokens: 1e9")},
    ),
    "too few tokens": Case(
        "small.yaml training.steps=null training.tokens=255",
        ("command line: training.tokens: expected at least one step of 256, got 255",),
    ),
    "micro batch": Case(
        "small.yaml training.micro_batch_size=3 training.global_batch_size=4",
        ("training.global_batch_size: expected a multiple of micro_batch_size=3, got 4",),
    ),
    # Layout.
    "sequence parallel": Case(
        "small.yaml parallel.tensor=2 training.seq_length=65",
        ("training.seq_length: expected a multiple of parallel.tensor * parallel.context = 2 * 1 under sequence "
                "parallelism, got 65",),
    ),
    "sgd": Case(
        "small.yaml megatron.optimizer=sgd",
        ("megatron.optimizer: expected adam or muon, whose checkpoints can be read, got 'sgd'",),
    ),
    "muon in fp16": Case(
        "small.yaml megatron.optimizer=muon training.precision=fp16",
        ("training.precision: expected bf16 or fp32 with megatron.optimizer=muon, got fp16",),
    ),
    "what goes not with muon": Case(
        "small.yaml megatron.optimizer=muon megatron.optimizer_cpu_offload=true",
        ("megatron.optimizer_cpu_offload: expected false with megatron.optimizer=muon, got true",),
    ),
    "the precision-aware optimizer without Transformer Engine": Case(
        "small.yaml megatron.use_precision_aware_optimizer=true", ("requires FusedAdam from TransformerEngine",)
    ),
    "CUDA graphs on a CPU": Case(
        "small.yaml megatron.cuda_graph_impl=local", ("megatron.cuda_graph_impl: needs a GPU",)
    ),
    "Megatron-FSDP on a CPU": Case(
        "small.yaml megatron.use_megatron_fsdp=true", ("megatron.use_megatron_fsdp: needs a GPU",)
    ),
    "fewer workers than none": Case(
        "small.yaml megatron.num_workers=-1", ("megatron.num_workers: expected an integer of at least 0, got -1",)
    ),
    "wandb that is not installed": Case(
        "small.yaml megatron.wandb_project=x", ("megatron.wandb_project: the package wandb is not installed",)
    ),
    "run.wandb without its package": Case("small.yaml run.wandb=x", ("run.wandb: the package wandb is not installed",)),
    "samples of generated tokens": Case(
        "small.yaml run.sample_prompts=[a]", ("run.sample_prompts: expected data of text, got generated tokens",)
    ),
    "samples of a model in parts": Case(
        "small.yaml data.text=a.txt run.sample_prompts=[a] parallel.tensor=2",
        ("run.sample_prompts: expected parallel.tensor=1, which leaves a process the whole model, got 2",),
    ),
    "tasks without a name": Case(
        "small.yaml data.text=a.txt run.evaluate=--limit=3", ("run.evaluate: the following arguments are required",)
    ),
    "saving beside training without NVIDIA's package": Case(
        "small.yaml megatron.async_save=true megatron.use_persistent_ckpt_worker=true",
        ("megatron.use_persistent_ckpt_worker: needs nvidia_resiliency_ext, or megatron.async_strategy=mcore",),
    ),
    "another schedule's option": Case(
        "small.yaml megatron.lr_wsd_decay_style=cosine",
        ("megatron.lr_wsd_decay_style: has no effect without training.lr_schedule=wsd",),
    ),
    "a decay longer than what is left": Case(
        "small.yaml training.lr_schedule=wsd training.warmup_fraction=0.5 training.decay_fraction=0.6",
        ("training.decay_fraction: expected at most 1 - warmup_fraction = 0.5, got 0.6",),
    ),
    "stages": Case(
        "small.yaml parallel.pipeline=2 model.pattern=C-|*-|C-", ("model.pattern:", "parallel.pipeline=2", "got 3")
    ),
    "layers for the stages": Case("small.yaml parallel.pipeline=3", ("parallel.pipeline:", "4 layers", "got 3")),
    "world size": Case(
        "small.yaml parallel.tensor=2",
        ("parallel: expected a number of processes that tensor * pipeline * context = 2 divides, got 3",),
        env={**TORCHRUN, "WORLD_SIZE": "3"},
    ),
    "too few processes": Case("small.yaml parallel.tensor=2", ("tensor * pipeline * context = 2 divides, got 1",)),
    "global batch": Case(
        "small.yaml",
        ("training.global_batch_size:", "micro_batch_size * data-parallel replicas = 1 * 3, got 4"),
        env={**TORCHRUN, "WORLD_SIZE": "3"},
    ),
    "micro-batches for the stages": Case(
        "small.yaml parallel.pipeline=2 model.pattern=C-|*-|C-|*- training.global_batch_size=3",
        ("training.global_batch_size: with 4 stages on parallel.pipeline=2", "that 2 divides, got 3"),
        env={**TORCHRUN, "WORLD_SIZE": "2"},
    ),
    "half of torchrun's environment": Case(
        "small.yaml", ("environment: WORLD_SIZE, LOCAL_RANK", "not set beside RANK; launch with torchrun"),
        env={"RANK": "0"},
    ),
    "world size that is no number": Case(
        "small.yaml", ("environment: WORLD_SIZE: expected a number of processes, got 'all'",),
        env={**TORCHRUN, "WORLD_SIZE": "all"},
    ),
    "attention heads for tensor parallel": Case(
        "small.yaml parallel.tensor=4 model.num_attention_heads=2",
        ("model.num_attention_heads: expected a multiple of parallel.tensor=4, got 2",),
        env={**TORCHRUN, "WORLD_SIZE": "4"},
    ),
    "MLP for tensor parallel": Case(
        "small.yaml parallel.tensor=4 model.ffn_hidden_size=162",
        ("model.ffn_hidden_size: expected a multiple of parallel.tensor=4, got 162",),
        env={**TORCHRUN, "WORLD_SIZE": "4"},
    ),
    # Data.
    "missing text": Case(
        "small.yaml data.text=gone.txt", ("data.text:", "gone.txt does not exist or is not a regular file")
    ),
    "empty text": Case(
        "small.yaml data.text=empty.txt", ("data.text:", "empty.txt is empty"), {"empty.txt": ""}
    ),
    "text too short": Case(
        "small.yaml data.text=short.txt",
        ("data.text:", "short.txt gives", "train tokens, but seq_length 64 needs at least 65"),
        {"short.txt": "a few\nwords\nand no more\n"},
        leaves=("runs/small-short/data/short-",), bar=True,
    ),
    "validation text too short": Case(
        "small.yaml data.text=short.txt",
        ("data.text:", "validation tokens, but seq_length 64", "or a larger data.validation_fraction"),
        {"short.txt": "a line of text\n" * 40},
        leaves=("runs/small-short/data/short-",), bar=True,
    ),
    "text key": Case(
        "small.yaml data.text=a.jsonl", ("a.jsonl line 1 has no key 'text' (text_key); found: 'body'",),
        {"a.jsonl": '{"body": "x"}\n{"body": "y"}\n'}, bar=True,
    ),
    "tokenizer": Case("small.yaml data.tokenizer=words", ("data.tokenizer must be", "got 'words'")),
    "tokenizer file": Case(
        "small.yaml data.tokenizer=sentencepiece:gone.model", ("data.tokenizer:", "gone.model, which is not a file")
    ),
    "indexed data": Case("small.yaml data.indexed=[gone]", ("data.indexed: gone.bin does not exist",)),
    "text and indexed": Case("small.yaml data.text=a data.indexed=[b]", ("data.text: expected either text or",)),
    "vocabulary": Case(
        "small.yaml model.vocab_size=10", ("model.vocab_size: expected at least the 65 token ids", "got 10")
    ),
    "recall without room": Case(
        "small.yaml data.recall.num_pairs=32", ("data.recall.num_pairs 32 needs a seq_length of at least 66", "got 64")
    ),
    "recall without keys": Case(
        "small.yaml data.recall.num_keys=3", ("needs 4 different keys, but data.recall.num_keys is 3",)
    ),
    # Megatron's arguments.
    "unknown Megatron argument": Case(
        "small.yaml megatron.recompute_granularty=full",
        ("unknown key megatron.recompute_granularty", "did you mean megatron.recompute_granularity?"),
    ),
    "Megatron argument that we decide": Case(
        "small.yaml megatron.bf16=true", ("megatron.bf16: set training.precision instead",)
    ),
    "value of a Megatron argument": Case(
        "small.yaml megatron.recompute_granularity=all",
        ("megatron.recompute_granularity: expected one of full, selective, got 'all'",),
    ),
    "number of values": Case(
        "small.yaml megatron.rampup_batch_size=[1,2]", ("megatron.rampup_batch_size: expected 3 values, got 2",)
    ),
    "Megatron argument without effect": Case(
        "small.yaml megatron.eod_mask_loss=true", ("megatron.eod_mask_loss: has no effect in this program",)
    ),
    "Megatron arguments that exclude each other": Case(
        "small.yaml megatron.recompute_granularity=selective megatron.recompute_method=block",
        ("Megatron refuses its arguments: ",),
    ),
    # What this machine has.
    "no GPU": Case("small.yaml run.device=cuda", ("run.device: expected a GPU for cuda, but torch finds none",)),
    "no Transformer Engine": Case(
        "small.yaml model.layers=transformer_engine", ("model.layers: transformer_engine is not installed; install",)
    ),
    "overlap without Transformer Engine": Case(
        "small.yaml megatron.tp_comm_overlap=true",
        ("megatron.tp_comm_overlap: expected Transformer Engine's layers", "got model.layers: local"),
    ),
    "no Triton kernels": Case("small.yaml model.mixer_backend=triton", ("'triton'", "use backend='torch' or 'auto'")),
    "letter M": Case("small.yaml model.pattern=M-C-", ("model.pattern: the layers M need Transformer Engine",)),
    "experts without a number": Case("small.yaml model.pattern=C-E", ("megatron.num_experts: expected an integer",)),
    "letter G": Case("small.yaml model.pattern=G-C-", ("model.pattern: the layer G", "needs flash-linear-attention")),
    "a file in the place of the runs": Case("small.yaml", ("Not a directory", "runs/small"), {"runs": ""}),
    # Checkpoints.
    "no checkpoint to load": Case(
        "small.yaml checkpoint.load=runs/other", ("checkpoint.load: no checkpoint in runs/other/checkpoints",)
    ),
    "checkpoint to load is of another shape": Case(
        "small.yaml checkpoint.load=runs/other", ("runs/other", "model.ffn_hidden_size is 96 there and 160 here"),
        setup=lambda: save_checkpoint("model.ffn_hidden_size=96", name="other"),
    ),
    "checkpoint is of another shape": Case(
        "small.yaml model.hidden_size=128",
        ("runs/small/checkpoints", "another model", "model.hidden_size is 64 there and 128 here"),
        setup=save_checkpoint,
    ),
    "checkpoint is damaged": Case(
        "small.yaml", ("iter_0000005: the checkpoint is incomplete", "cut short (100 of", "left as it is"),
        setup=save_damaged_checkpoint,
    ),
    "checkpoint without its recipe": Case(
        "small.yaml", ("runs/small/checkpoints: holds a checkpoint, but runs/small/recipe.yaml, its recipe, is gone",),
        setup=save_checkpoint_without_recipe,
    ),
}  # fmt: skip


def run_all(results: Path) -> None:
    """Run every case in a folder of its own and write what came of it."""
    import torch.distributed.checkpoint  # noqa: F401

    from megatron_carve import train
    from megatron_carve.run import preflight

    join = preflight.join_processes

    def join_alone():
        assert os.environ.get("WORLD_SIZE", "1") == "1", "would wait for processes that no one starts"
        return join()

    preflight.join_processes = join_alone
    outcomes = {}
    for name, case in CASES.items():
        folder = Path(tempfile.mkdtemp(dir=results.parent))
        os.chdir(folder)
        Path("small.yaml").write_text(SMALL)
        for file, text in case.files.items():
            Path(file).write_text(text)
        if case.setup:
            case.setup()
        before, environment, built = contents(folder), dict(os.environ), []
        os.environ.update(case.env)
        # What would build the model.
        train._train = lambda plan, built=built: built.append(plan) or 0
        with captured_stderr() as stderr:
            try:
                status = train.main(case.words.split(" "))
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        os.environ.clear()
        os.environ.update(environment)
        logging.getLogger("megatron_carve").handlers.clear()
        after = contents(folder)
        outcomes[name] = {
            "status": status,
            "stderr": stderr[0],
            "built": len(built),
            "changed": sorted(file for file in before if after.get(file) != before[file]),
            "created": sorted(set(after) - set(before)),
        }
    results.write_text(json.dumps(outcomes))


@contextlib.contextmanager
def captured_stderr():
    """Yields a list that at the end holds the text of stderr, from Python or not."""
    text: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text.append(file.read())


def contents(folder: Path) -> dict[str, list]:
    """Size and time of every file, relative to the folder."""
    return {
        str(file.relative_to(folder)): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each case."""
    results = tmp_path_factory.mktemp("bad input") / "results.json"
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    run = subprocess.run(
        [sys.executable, __file__, str(results)], capture_output=True, text=True, timeout=120,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(results.read_text())


def check(case, outcome):
    assert outcome["status"] == 2
    assert outcome["built"] == 0
    assert outcome["changed"] == []
    assert [file for file in outcome["created"] if not file.startswith(case.leaves)] == []
    assert [leaf for leaf in case.leaves if not any(file.startswith(leaf) for file in outcome["created"])] == []
    *before, last = outcome["stderr"].replace("\r", "\n").splitlines() or [""]
    if case.bar:
        assert all("tokenising" in line or not line for line in before)
    else:
        assert before == []
    if not case.says:
        assert last == ""
        return
    assert last.startswith("error: ")
    for part in case.says:
        assert part in last
        last = last.partition(part)[2]


@pytest.mark.parametrize("name", CASES)
def test_ends_in_one_line(outcomes, name):
    check(CASES[name], outcomes[name])


def test_what_gloo_cannot_gather_of_experts():
    """With four processes, which these cases have not."""
    from megatron_carve.recipe import load_recipe
    from megatron_carve.run.preflight import check_options

    words = ["model.pattern=C-E", "megatron.num_experts=4", "parallel.tensor=2"]
    spread = [*words, "megatron.expert_model_parallel_size=2"]
    for allowed in (words, [*spread, "megatron.expert_tensor_parallel_size=1"]):
        check_options(load_recipe("debug", allowed), "cpu")
    check_options(load_recipe("debug", spread), "cuda")
    with pytest.raises(ValueError, match=r"expert_tensor_parallel_size: expected 1 on a CPU .* got 2"):
        check_options(load_recipe("debug", spread), "cpu")


def test_what_gloo_cannot_gather_of_interleaved_stages():
    """Numbers of two types in one call, as they are collected for all stages of a rank but the first."""
    from megatron_carve.recipe import load_recipe
    from megatron_carve.run.preflight import check_options

    interleaved = ["parallel.pipeline=2", "training.precision=bf16", "model.pattern=C-|*|-C|-"]
    for words in (["training.precision=fp32"], ["model.pattern=C-*|-C-"], ["model.pattern=*-|*|-*|-"]):
        check_options(load_recipe("debug", [*interleaved, *words]), "cpu")
    check_options(load_recipe("debug", interleaved), "cuda")
    with pytest.raises(ValueError, match=r"training.precision: expected fp32 on a CPU .* got bf16"):
        check_options(load_recipe("debug", interleaved), "cpu")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
