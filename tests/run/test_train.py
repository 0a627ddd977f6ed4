"""The training program from end to end, as a user runs it: learn, be killed, resume, run on several processes."""

import fractions
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.forks import checked, run_forked
from support.parallel import launch
from support.programs import program
from support.train import losses, train, train_ranks

from megatron_carve import checksums
from megatron_carve.run.progress import read_metrics

TINY = """
inherit: debug
model: {pattern: C-2-, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 1}
mixer: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 16, value_head_dim: 16, content_rank: 4}
training: {steps: 12, seq_length: 96, micro_batch_size: 2, global_batch_size: 4, eval_interval: 6, eval_iters: 2}
checkpoint: {interval: 4}
run: {log_interval: 1}
"""  # tensor-parallel ranks need not divide attention heads where no layer has any
# What a run says where all goes well.
OWN_LINES = (
    r"backend 'auto' on cpu: torch$|\r?tokenising cats\.txt: |(train|validation): cats-"
    r"|straight: C-2- on cpu, starting, 12 steps$"
    r"|layers: Megatron|the first step compiles what torch fuses|set up and compiled in |step +\d+/12 \| loss "
    r"|  validation at step (6|12): loss |trained [\d,]+ parameters to step 12; |validation loss \d"
    r"|loss curve runs/straight/loss.png, summary "
)
TEXT = "".join(f"line {i}: the cat sat on the mat, and then it sat again. ünïcode\n" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "cats.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    """A run that nothing interrupts."""
    return train(folder, "tiny.yaml", "run.name=straight", "data.text=cats.txt")


def test_a_run_on_text_learns_and_leaves_everything(folder, straight):
    run = folder / "runs" / "straight"
    curve = losses(folder, "straight")
    assert list(curve) == list(range(1, 13))
    assert curve[1] == pytest.approx(np.log(257), rel=0.1)
    assert curve[12] < curve[1] - 0.5
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_loss"] == curve[12]
    assert summary["steps"] == 12
    assert summary["chance_loss"] == pytest.approx(np.log(257))
    assert summary["final_validation"]["validation_loss"] < 5.5
    assert 0 <= summary["final_validation"]["accuracy"] <= 1
    assert np.asarray(Image.open(run / "loss.png").convert("L")).std() > 10
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "12"
    for said in ("step 12/12", "tokens/s", "left", "validation loss", "next-token accuracy"):
        assert said in straight.stdout
    said = filter(None, (straight.stdout + straight.stderr).splitlines())
    assert [line for line in said if not re.match(OWN_LINES, line)] == []


@pytest.mark.long
def test_samples_and_tasks_at_every_evaluation_leave_the_run_as_it_is(folder, straight):
    words = ["tiny.yaml", "run.name=samples", "data.text=cats.txt", "run.sample_prompts=[the cat, '']"]
    tasks = "run.evaluate='--tasks perplexity,single_1 --text cats.txt --samples 1 --needle-lengths 300'"
    out = train(folder, *words, "run.sample_tokens=5", tasks).stdout
    assert losses(folder, "samples") == losses(folder, "straight")
    lines = (folder / "runs/samples/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [(s["step"], s["prompt"]) for s in samples] == [(6, "the cat"), (6, ""), (12, "the cat"), (12, "")]
    assert all(1 <= len(s["text"]) <= 5 for s in samples) and out.count('  sample at step 6: "the cat') == 1
    results = [json.loads(x) for x in (folder / "runs/samples/evaluations.jsonl").read_text().splitlines()]
    assert [(r["step"], *r) for r in results] == [(s, "step", n) for s in (6, 12) for n in ("perplexity", "needles")]
    assert results[2]["perplexity"]["perplexity"] < results[0]["perplexity"]["perplexity"] < 257
    assert out.count("  perplexity of cats.txt") == 2 and out.count("  single_1") == 2


@pytest.mark.long
def test_old_checkpoints_go(folder):
    words = ["run.name=kept", "data.text=cats.txt", "checkpoint.interval=2", "training.eval_interval=4"]
    train(folder, "tiny.yaml", *words, "checkpoint.keep=2", "checkpoint.keep_every=6")
    checkpoints = (folder / "runs/kept/checkpoints").iterdir()
    assert sorted(p.name for p in checkpoints if p.is_dir()) == ["iter_0000006", "iter_0000010", "iter_0000012"]


def test_every_evaluation_sees_the_same_text(folder, straight):
    """After the last step there are two."""
    said = re.findall("validation at step 12: (.*)", straight.stdout)
    assert len(said) == 2 and said[0] == said[1]


@pytest.mark.long
def test_other_data_than_the_checkpoints_are_said(folder):
    (folder / "changing.txt").write_text(TEXT)
    words = ["tiny.yaml", "run.name=changing", "data.text=changing.txt"]
    train(folder, *words, "training.steps=4")
    assert "data.text" not in train(folder, *words, "training.steps=5").stdout
    (folder / "changing.txt").write_text(TEXT.replace("cat", "dog"))
    changed = train(folder, *words, "training.steps=6").stdout
    assert "data.text: changing.txt is not what it was when the checkpoint was saved" in changed
    continues = ["tiny.yaml", "run.name=other", "data.text=cats.txt", "checkpoint.load=runs/changing"]
    other = train(folder, *continues, "training.steps=7").stdout
    assert "data.text was changing.txt when the checkpoint was saved and is cats.txt now" in other


@pytest.mark.parametrize("place", ["the index", pytest.param("common_state", marks=pytest.mark.slow)])
def test_what_a_stranger_has_pickled_into_a_checkpoint_is_not_loaded(folder, straight, place):
    from torch.distributed.checkpoint import FileSystemReader

    name = place.replace(" ", "_")
    shutil.copytree(folder / "runs/straight", folder / "runs" / name)
    checkpoint = folder / "runs" / name / "checkpoints/iter_0000012"
    index = FileSystemReader(checkpoint).read_metadata()
    if place == "the index":
        index.storage_meta.save_id = fractions.Fraction(1, 2)
    else:
        part = next(part for at, part in index.storage_data.items() if at.fqn.startswith(place))
        file = checkpoint / part.relative_path
        whole = file.read_bytes()
        state = torch.load(io.BytesIO(whole[part.offset :][: part.length]), weights_only=False)
        state[0]["harmless"] = fractions.Fraction(1, 2)
        torch.save(state, changed := io.BytesIO())
        file.write_bytes(whole + changed.getvalue())
        part.offset, part.length = len(whole), len(changed.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    checksums.write_list(checkpoint, [file.name for file in checkpoint.iterdir() if file.name != checksums.LIST])
    goes_on = ["train", "tiny.yaml", f"run.name={name}", "data.text=cats.txt", "training.steps=14"]
    done = program(folder, *(goes_on if place == "the index" else ["export", f"runs/{name}", "out"]), check=False)
    assert done.returncode == 2, done
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "holds fractions.Fraction, which" in last and "not loaded" in last


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(folder, straight):
    summary = folder / "runs" / "straight" / "summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()  # as if killed just before it was written
    again = train(folder, "tiny.yaml", "run.name=straight", "data.text=cats.txt")
    assert "at step 12 of 12: nothing left to train" in again.stdout
    assert json.loads(summary.read_text())["final_loss"] == before["final_loss"]
    assert list(losses(folder, "straight")) == list(range(1, 13))


def test_the_saved_recipe_describes_the_run(folder, straight):
    from megatron_carve.recipe import load_recipe

    saved = load_recipe(str(folder / "runs" / "straight" / "recipe.yaml"))
    assert saved.training.steps == 12
    assert saved.data.text == "cats.txt"
    assert saved.run.name == "straight"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_resumes_with_the_same_losses(folder, straight, how):
    name = how.name
    words = ["tiny.yaml", f"run.name={name}", "data.text=cats.txt"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_carve.train", *words], cwd=folder, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(losses(folder, name)) >= 6):
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    status = process.wait(60)
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 143)
    tracker = folder / "runs" / name / "checkpoints" / "latest_checkpointed_iteration.txt"
    at = int(tracker.read_text())
    assert at >= 6 if how == signal.SIGTERM else at in (4, 8)
    if at < 12:
        assert f"resuming at step {at}" in train(folder, *words).stdout
    expected, actual = losses(folder, "straight"), losses(folder, name)
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-6), f"step {step}"
    final = [
        json.loads((folder / "runs" / n / "summary.json").read_text())["final_validation"] for n in ("straight", name)
    ]
    assert final[1] == pytest.approx(final[0], rel=1e-6)


@pytest.mark.slow
def test_a_bf16_run_resumes_with_the_same_losses(folder):
    """Its model has float32 parameters among 16-bit ones."""
    words = ["tiny.yaml", "run.name=bf16", "training.precision=bf16", "training.steps=6", "checkpoint.interval=3"]
    words += ["model.pattern=C-*-", "model.attention_convolution=dynamic"]
    train(folder, *words)
    straight = losses(folder, "bf16")
    (folder / "runs" / "bf16" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    (folder / "runs" / "bf16" / "metrics.jsonl").unlink()
    train(folder, *words)
    assert losses(folder, "bf16") == pytest.approx({step: straight[step] for step in (4, 5, 6)}, rel=1e-6)


@pytest.mark.long
def test_two_replicas_train_as_one_process(folder, straight):
    launch(2, ["-m", "megatron_carve.train", "tiny.yaml", "run.name=replicas", "data.text=cats.txt"], cwd=folder)
    expected, actual = losses(folder, "straight"), losses(folder, "replicas")
    assert actual.keys() == expected.keys()
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


@pytest.mark.parametrize(
    "more",
    [
        # Of the recall task the processes hold different numbers of tokens that count.
        pytest.param(["model.pattern=C-2-"], marks=pytest.mark.long, id="recurrent"),
        pytest.param(["model.pattern=C-*-"], marks=pytest.mark.long, id="hybrid"),
        pytest.param(["model.pattern=2-*-", "data.text=lines.jsonl", "data.documents=apart"], marks=pytest.mark.slow,
                     id="hybrid of documents apart"),
    ],
)  # fmt: skip
def test_tokens_spread_over_two_processes_train_as_one(folder, more, request):
    draw = random.Random(0)
    lines = (json.dumps({"text": TEXT[: draw.choice([0, 3, 30, 150])]}) for _ in range(200))
    (folder / "lines.jsonl").write_text("\n".join(lines))
    name = request.node.callspec.id
    words = ["tiny.yaml", "model.num_attention_heads=2", *more, "training.steps=6", "checkpoint.interval=null"]
    train(folder, *words, f"run.name={name} together")
    train_ranks(2, folder, *words, f"run.name={name} spread", "parallel.context=2")
    expected, actual = losses(folder, f"{name} together"), losses(folder, f"{name} spread")
    assert list(actual) == list(expected) == list(range(1, 7))
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


EXPERTS = (
    "model.pattern=C-CE*E", "megatron.num_experts=4", "megatron.moe_ffn_hidden_size=32", "training.seq_length=48",
    "megatron.moe_token_dispatcher_type=alltoall", "checkpoint.interval=2", "training.lr_schedule=constant",
    "training.warmup_fraction=0",
)  # fmt: skip
SPREAD = "megatron.expert_model_parallel_size=2"


@pytest.mark.long
def test_experts_go_from_one_process_to_several_and_back(folder):
    """Spread over ranks they have an optimizer of their own; the first of two stages here has none of them."""
    words = ["tiny.yaml", "data.text=cats.txt", *EXPERTS]
    whole = train(folder, *words, "run.name=experts_unmoved", "training.steps=8").stdout
    walk = [(1, ()), (2, (SPREAD,)), (4, (SPREAD, "parallel.pipeline=2")), (1, ())]
    for leg, (processes, layout) in enumerate(walk):
        out = train_ranks(
            processes, folder, *words, "run.name=experts", f"training.steps={2 * leg + 2}", *layout
        ).stdout  # fmt: skip
    expected, actual = losses(folder, "experts_unmoved"), losses(folder, "experts")
    assert list(actual) == list(expected) == list(range(1, 9))
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), f"step {step}"
    said = [re.search(r"trained ([\d,]+) parameters", text) for text in (whole, out)]
    assert said[0] and said[1] and said[0][1] == said[1][1]


# Processes, and how the model is spread over them; data parallelism takes the rest.
LAYOUTS = [
    (1, ()),
    (2, ()),
    (2, ("parallel.tensor=2",)),
    (2, ("parallel.tensor=2", "parallel.sequence=false")),
    (2, ("parallel.context=2",)),
    (2, ("parallel.pipeline=2",)),
    (4, ("parallel.tensor=2", "parallel.context=2")),
    (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    (4, ("parallel.context=2",)),
    (4, ("parallel.context=2", "parallel.pipeline=2")),
    (2, ("parallel.context=2", "parallel.context_method=sequence", "model.mixer_recompute=true")),
]
WALKS = range(10)


@pytest.fixture(scope="module")
def unmoved(folder):
    """Twelve steps that every walk over layouts repeats."""
    words = [
        "tiny.yaml", "data.text=cats.txt", "mixer.num_key_heads=4", "mixer.num_value_heads=4",
        "training.lr_schedule=constant", "training.warmup_fraction=0", "checkpoint.interval=3",
    ]  # fmt: skip
    train(folder, *words, "run.name=unmoved")
    return words


@pytest.mark.long
@pytest.mark.parametrize("seed", WALKS)
def test_a_walk_over_layouts_trains_as_one_process(folder, unmoved, seed):
    """Every three steps the run is resumed at another layout, parameters and optimizer with it."""
    # the first leg draws the weights, which tensor parallelism draws differently
    walk = [LAYOUTS[0], *random.Random(seed).choices(LAYOUTS[1:], k=3)]
    for leg, (processes, layout) in enumerate(walk):
        train_ranks(processes, folder, *unmoved, f"run.name=walk{seed}", f"training.steps={3 * leg + 3}", *layout)
    expected, actual = losses(folder, "unmoved"), losses(folder, f"walk{seed}")
    assert list(actual) == list(expected) == list(range(1, 13))
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=2e-5), f"step {step} of {walk}"


@pytest.mark.long
def test_a_run_continues_another_at_another_layout(folder, straight):
    words = ["tiny.yaml", "run.name=split", "data.text=cats.txt", "checkpoint.load=runs/straight"]
    out = train_ranks(2, folder, *words, "parallel.tensor=2", "training.steps=14").stdout
    assert "continuing another run at step 12" in out
    train(folder, *words[:1], "run.name=whole", *words[2:], "training.steps=14")
    expected, actual = losses(folder, "whole"), losses(folder, "split")
    assert list(actual) == list(expected) == [13, 14]
    for step, loss in expected.items():
        assert actual[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


@pytest.mark.long
def test_a_run_goes_on_with_another_learning_rate(folder, straight):
    """The recipe decides, not the checkpoint; upstream's optimizer would not find its own parameters again."""
    shutil.copytree(folder / "runs" / "straight", folder / "runs" / "slower")
    (folder / "runs" / "slower" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    train(folder, "tiny.yaml", "run.name=slower", "data.text=cats.txt", "training.lr=1e-5", "training.min_lr=1e-6")
    metrics = read_metrics(folder / "runs" / "slower" / "metrics.jsonl")
    rates = {r["step"]: r["learning_rate"] for r in metrics if "learning_rate" in r}
    assert all(rates[step] <= 1e-5 < rates[4] for step in range(5, 13))


@pytest.mark.long
def test_a_learning_rate_that_stays_and_then_comes_down(folder):
    words = ["tiny.yaml", "run.name=wsd", "training.steps=12", "training.lr_schedule=wsd", "training.lr=1e-3"]
    train(folder, *words, "training.min_lr=0", "training.warmup_fraction=0.25", "training.decay_fraction=0.5")
    metrics = read_metrics(folder / "runs" / "wsd" / "metrics.jsonl")
    rates = [r["learning_rate"] for r in metrics if "learning_rate" in r]
    assert rates[:3] == sorted(rates[:3]) and rates[3:6] == pytest.approx([1e-3] * 3)
    assert rates[6:] == pytest.approx([1e-3 * (5 - i) / 6 for i in range(6)], abs=1e-9)


@pytest.mark.slow
def test_weights_alone_start_a_run_anew(folder, straight):
    words = ["tiny.yaml", "run.name=fresh", "data.text=cats.txt", "checkpoint.load=runs/straight"]
    train(folder, *words, "checkpoint.weights_only=true", "training.steps=4")
    curve = losses(folder, "fresh")
    assert list(curve) == [1, 2, 3, 4]
    assert curve[1] < losses(folder, "straight")[1] - 0.3
    assert "resuming at step 4" in train(folder, *words, "checkpoint.weights_only=true", "training.steps=5").stdout


@pytest.mark.slow
def test_the_recall_task_and_multi_token_prediction(folder):
    out = train(folder, "tiny.yaml", "run.name=recall", "model.pattern=C-*-/2-", "training.steps=6").stdout
    assert "recall accuracy" in out
    summary = json.loads((folder / "runs" / "recall" / "summary.json").read_text())
    assert summary["chance_loss"] == pytest.approx(np.log(32))
    assert summary["accuracy_name"] == "recall accuracy"


@pytest.mark.long
def test_json_lines_and_indexed_datasets(folder):
    documents = [{"body": f"document {i} " * 30} for i in range(60)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    words = ["tiny.yaml", "training.steps=3", "checkpoint.interval=null"]
    train(folder, *words, "run.name=lines", "data.text=docs.jsonl", "data.text_key=body")
    assert losses(folder, "lines")[3] < losses(folder, "lines")[1]
    (prepared,) = (folder / "runs" / "lines" / "data").glob("docs-*")
    words += ["run.name=indexed", f"data.indexed=[{prepared}, {prepared}/validation]"]
    out = train(folder, *words, f"data.validation={prepared}/validation").stdout
    assert "/train: 57 documents, 20,277 tokens, 94.9% of the batches; the run sees 0.0" in out
    assert "/validation: 3 documents, 1,083 tokens\n" in out
    assert losses(folder, "indexed")[1] == pytest.approx(losses(folder, "lines")[1], rel=0.1)


@pytest.mark.slow
def test_a_trained_model_is_fine_tuned_on_completions(folder, straight):
    lines = [{"prompt": f"line {i}:", "completion": " the dog ran."} for i in range(60)]
    (folder / "dogs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["tiny.yaml", "run.name=tuned", "data.text=dogs.jsonl", "data.loss_on=completion", "training.steps=4"]
    words += ["checkpoint.load=runs/straight", "checkpoint.weights_only=true", "checkpoint.interval=null"]
    out = train(folder, *words, "training.lr=1e-2").stdout
    assert "/train: 57 documents, 1,244 tokens; the run sees up to 1.23 epochs of it" in out
    tuned = losses(folder, "tuned")
    assert tuned[4] < tuned[1]


def test_a_checkpoint_of_another_model_is_refused_and_kept(folder, straight):
    checkpoints = folder / "runs" / "straight" / "checkpoints"
    before = {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")}
    run = train(
        folder, "tiny.yaml", "run.name=straight", "data.text=cats.txt", "mixer.content_rank=8", check=False
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "mixer.content_rank is 4 there and 8 here" in run.stderr
    assert {p: p.stat().st_mtime_ns for p in checkpoints.rglob("*")} == before


@pytest.mark.long
def test_evaluations_and_the_end_may_come_before_the_first_step_that_counts(folder):
    """float16's loss scale starts so high that the first steps are skipped."""
    words = ["tiny.yaml", "data.text=cats.txt", "run.name=half", "training.precision=fp16", "checkpoint.interval=2"]
    out = train(folder, *words, "training.steps=3", "training.eval_interval=2").stdout
    assert out.count("validation at step") == 2 and "lr 0.00e+00" in out
    out = train(folder, *words, "training.steps=40", "training.eval_interval=8").stdout
    assert "resuming at step 3" in out
    assert losses(folder, "half")[40] < losses(folder, "half")[1]


HOLDS = """
import sys
from pathlib import Path
from megatron_carve.run.folder import RunFolder
lock = RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_a_run_that_another_program_trains_is_left_alone(folder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder / "runs" / "taken"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        run = train(folder, "tiny.yaml", "run.name=taken", "training.steps=2", check=False)
        assert run.returncode == 2
        assert "runs/taken: another program trains in this run (process " in run.stderr
        assert sorted(path.name for path in (folder / "runs" / "taken").iterdir()) == [".lock"]
        other.communicate()
    train(folder, "tiny.yaml", "run.name=taken", "training.steps=2")


@pytest.mark.slow
def test_an_optimizer_that_cannot_go_on_is_named(folder, straight):
    words = ["tiny.yaml", "data.text=cats.txt", "run.name=straight", "megatron.optimizer=lion"]
    run = train(folder, *words, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "the state of another optimizer (megatron.optimizer is 'adam' there and 'lion' here)" in run.stderr
    words = ["tiny.yaml", "data.text=cats.txt", "run.name=bare", "checkpoint.interval=2", "megatron.no_save_optim=true"]
    train(folder, *words, "training.steps=2")
    run = train(folder, *words, "training.steps=4", check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "the checkpoint has no state of an optimizer" in run.stderr


@pytest.mark.slow
def test_a_failing_rank_ends_the_job_with_its_own_error(folder):
    with pytest.raises(AssertionError, match=r"megatron\.recompute_granularity"):
        launch(
            2,
            ["-m", "megatron_carve.train", "tiny.yaml", "run.name=bad", "megatron.recompute_granularity=half"],
            cwd=folder,
        )
    assert not (folder / "runs" / "bad").exists()


FAILS_IN_STEP_TWO = """
import os, sys
from megatron_carve import train
from megatron_carve.run import task

forward, calls = task.Task.forward_step, []

def failing(self, *args):
    calls.append(None)
    if len(calls) == 3 and int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"]):
        raise RuntimeError("the loss fell off a cliff")
    return forward(self, *args)

task.Task.forward_step = failing
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_failure_ends_the_program_although_data_workers_run(folder):
    run = subprocess.run(
        [sys.executable, "-c", FAILS_IN_STEP_TWO, "tiny.yaml", "run.name=fails", "megatron.num_workers=2"],
        cwd=folder, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("RuntimeError: the loss fell off a cliff")


AS_PYTHON_3_14 = """
import multiprocessing, sys
from megatron_carve import train

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    status = train.main(sys.argv[1:])
    assert multiprocessing.get_start_method() == "forkserver"
    sys.exit(status)
"""


@pytest.mark.long
def test_data_workers_where_processes_are_not_forked_by_default(folder):
    program = folder / "as_python_3_14.py"
    program.write_text(AS_PYTHON_3_14)
    words = ["tiny.yaml", "data.text=cats.txt", "run.name=workers", "megatron.num_workers=2", "training.steps=2"]
    checked(run_forked([str(program), *words], cwd=folder, timeout=100))
    assert list(losses(folder, "workers")) == [1, 2]


NAN_IN_STEP_SIX = """
import sys
from megatron_carve import train
from megatron_carve.run import task

forward, calls = task.Task.forward_step, []

def poisoned(self, *args):
    calls.append(None)
    output, loss = forward(self, *args)
    return output * (float("nan") if len(calls) > 10 else 1.0), loss

task.Task.forward_step = poisoned
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_gradients_that_are_no_numbers_end_a_run_before_they_are_saved(folder):
    words = ["tiny.yaml", "run.name=poisoned", "checkpoint.interval=3"]
    run = subprocess.run(
        [sys.executable, "-c", NAN_IN_STEP_SIX, *words], cwd=folder, capture_output=True, text=True, timeout=100
    )  # fmt: skip
    assert run.returncode == 1
    assert "FloatingPointError: step 6: expected a finite norm of the gradients, got nan" in run.stderr
    checkpoints = folder / "runs" / "poisoned" / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert list(losses(folder, "poisoned")) == [1, 2, 3, 4, 5]


@pytest.mark.long
def test_torchrun_closes_with_the_error_of_the_rank_that_failed(folder):
    (folder / "fails.py").write_text(FAILS_IN_STEP_TWO)
    words = ["tiny.yaml", "run.name=one_fails", "parallel.tensor=2", "megatron.num_workers=1"]
    with pytest.raises(AssertionError) as failure:
        launch(2, ["fails.py", *words], cwd=folder)
    closing = str(failure.value).rpartition("Root Cause")[2]
    assert "RuntimeError: the loss fell off a cliff" in closing
    assert "rank      : 1 (local_rank: 1)" in closing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "said"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "stopped by Ctrl-C")],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_run_that_is_asked_to_stop_saves_and_says_so(folder, how, status, said):
    """Data workers get the signal too, as from a terminal."""
    name = f"stops{status}"
    words = ["tiny.yaml", f"run.name={name}", "training.steps=4000", "megatron.num_workers=2"]
    run = subprocess.Popen(
        [sys.executable, "-m", "megatron_carve.train", *words], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert run.stdout is not None and run.stderr is not None
    for line in run.stdout:
        if line.startswith("step    3/4000"):
            os.killpg(run.pid, how)
            break
    run.stdout.read()
    lines = [line for line in run.stderr.read().splitlines() if "stop" in line]
    assert run.wait(timeout=100) == status
    tracker = folder / "runs" / name / "checkpoints" / "latest_checkpointed_iteration.txt"
    step = int(tracker.read_text())
    assert step >= 3
    assert lines[-1] == (
        f"{name}: {said}; step {step} is saved in runs/{name}/checkpoints, and the same command goes on from there"
    )
    assert lines[:-1] == (["stopping: this step is finished and saved; Ctrl-C again ends at once"] * (status == 130))
