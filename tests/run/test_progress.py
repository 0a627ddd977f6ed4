"""Progress: the lines a person reads, metrics.jsonl, the summary and the loss curve, from made-up losses and times."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_carve import train
from megatron_carve.recipe import load_recipe
from megatron_carve.recipe.schema import LAYER_LETTERS
from megatron_carve.run import progress
from megatron_carve.run.folder import RunFolder
from megatron_carve.run.progress import Progress, read_metrics
from megatron_carve.run.speed import Gpus, peak_tflops

SMALL = """\
model: {pattern: C-*-, hidden_size: 64, ffn_hidden_size: 160, num_attention_heads: 4}
training: {steps: 40, seq_length: 100, global_batch_size: 5, eval_interval: 20}
run: {log_interval: 10}
"""
TOKENS_PER_STEP = 500


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Unread:
    """A loss on a GPU: reading it would wait."""

    def item(self):
        raise AssertionError("was read")

    __float__ = item


@pytest.fixture(autouse=True)
def clock(tmp_path, monkeypatch):
    """A clock that stands still until told; the working directory holds small.yaml and an empty run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Run:
    """A run's progress, and what it wrote."""

    def __init__(self, clock, *overrides, first_step=1):
        self.clock = clock
        self.recipe = load_recipe("small.yaml", overrides)
        self.folder = RunFolder(self.recipe.run.path)
        self.folder.save_recipe(self.recipe)
        self.console = io.StringIO()
        self.progress = Progress(self.recipe, chance_loss=2.0, first_step=first_step, console=self.console)

    def step(self, iteration, seconds, loss=3.0, learning_rate=1e-3, grad_norm=0.5):
        self.clock.now += seconds
        value = torch.tensor(loss) if isinstance(loss, float) else loss
        self.progress.on_step(iteration, {"lm loss": value}, learning_rate, grad_norm)

    def steps(self, first, last, seconds, loss=lambda step: 3.0):
        for iteration in range(first, last + 1):
            self.step(iteration, seconds, loss(iteration))

    def evaluate(self, seconds=0.0, **losses):
        self.clock.now += seconds
        self.progress.on_evaluation({name.replace("_", " "): torch.tensor(v) for name, v in losses.items()})

    def finish(self):
        self.progress.finish(parameters=1_234_567, device="cpu", layers="local")
        return json.loads(self.folder.summary.read_text())

    @property
    def lines(self):
        return self.console.getvalue().splitlines()

    @property
    def records(self):
        return [json.loads(line) for line in self.folder.metrics.read_text().splitlines()]


@pytest.fixture
def start(clock):
    return lambda *overrides, first_step=1: Run(clock, *overrides, first_step=first_step)


class TestSteps:
    def test_first_step_has_no_speed_yet(self, start):
        run = start()
        run.step(1, 4.0, loss=4.25, learning_rate=2.5e-4, grad_norm=torch.tensor(0.125))
        assert run.records == [
            {"step": 1, "loss": 4.25, "tokens_per_second": None, "learning_rate": 2.5e-4, "grad_norm": 0.125,
             "peak_memory_bytes": None},
        ]  # fmt: skip
        assert run.lines == ["step  1/40 | loss 4.2500 | grad norm 0.12 | lr 2.50e-04"]

    def test_the_first_step_of_a_start_says_how_long_it_took(self, start):
        run = start(first_step=13)
        run.progress.begin("small: goes on")
        run.steps(13, 14, 47.0)
        assert run.lines[0] == "small: goes on" and run.lines[1].startswith("the first step compiles what torch fuses")
        assert run.lines[2:] == ["set up and compiled in 47s"]

    @pytest.mark.parametrize(
        ("gpus", "said"),
        [
            (Gpus(1, 2e9, 4.0), "100 tokens/s, 0.2 TFLOP/s (5.0%) | "),
            (Gpus(4, 2e10, None), "100 tokens/s, 25 a GPU, 0.5 TFLOP/s a GPU | "),
            (Gpus(1, None, 4.0), "100 tokens/s | "),
            (Gpus(4, None, 4.0), "100 tokens/s, 25 a GPU | "),
        ],
    )
    def test_what_gpus_do(self, start, gpus, said):
        run = start()
        run.progress.gpus = gpus
        run.steps(1, 10, 5.0)
        assert said in run.lines[-1] and "GPU" not in run.lines[0]
        assert run.records[-1]["tokens_per_second_and_gpu"] == 100 / gpus.count
        known = gpus.flops_per_token is not None
        assert run.records[-1]["utilisation"] == (0.05 if known and gpus.peak_tflops else None)
        expected = pytest.approx(100 * gpus.flops_per_token / gpus.count / 1e12) if known else None
        assert run.records[-1]["tflops_per_second_and_gpu"] == expected

    @pytest.mark.parametrize("letter", LAYER_LETTERS)
    def test_whatever_layers_a_gpu_trains_it_has_a_speed(self, letter, monkeypatch):
        """Called as on a GPU; what the operations of a layer are need not be known to train it."""
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        words = [f"model.pattern=C-{letter}-", "megatron.num_experts=4", "training.precision=bf16"]
        plan = SimpleNamespace(recipe=load_recipe("debug", words), device="cuda", start=SimpleNamespace(vocab_size=100))
        gpus = train._gpus(plan)
        assert gpus.peak_tflops == 989.4
        assert (gpus.flops_per_token is None) == (letter in "GMD+")
        assert set(gpus.measures(1.0)) == {"tokens_per_second_and_gpu", "tflops_per_second_and_gpu", "utilisation"}

    def test_peaks_are_of_16_bit_numbers(self):
        assert peak_tflops("NVIDIA H200", "bf16") == 989.4
        assert peak_tflops("NVIDIA H200", "fp32") is None and peak_tflops("Another", "bf16") is None

    def test_peak_memory_of_a_gpu(self, start, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
        run = start()
        run.step(1, 4.0)
        assert run.records[0]["peak_memory_bytes"] == 12345
        assert run.finish()["peak_memory_bytes"] == 12345

    def test_speed_and_time_left(self, start):
        run = start()
        run.step(1, 30.0)  # compiling and filling caches is nobody's speed
        run.steps(2, 10, 0.25, loss=lambda step: 3.0 - step / 8)
        assert run.records[-1] == {
            "step": 10, "loss": 1.75, "tokens_per_second": 2000.0, "learning_rate": 1e-3, "grad_norm": 0.5,
            "peak_memory_bytes": None,
        }  # fmt: skip
        # 30 steps of 500 tokens are left.
        assert run.lines[-1].split(" | ")[-2:] == ["2.0k tokens/s", "8s left"]
        run.steps(11, 20, 50.0)
        # The average over the 19 intervals since the first step: 9 * 0.25 s and 10 * 50 s.
        speed = TOKENS_PER_STEP * 19 / 502.25
        assert run.records[-1]["tokens_per_second"] == pytest.approx(speed)
        assert run.lines[-1].endswith("| 19 tokens/s | 8m 49s left")  # 20 * 500 / 18.91 s

    def test_speed_follows_a_change(self, start):
        run = start("training.steps=60")
        run.steps(1, 20, 10.0)
        run.steps(21, 40, 0.5)
        assert run.records[-1]["tokens_per_second"] == TOKENS_PER_STEP / 0.5

    def test_lines_come_at_the_interval_and_at_both_ends(self, start):
        run = start("training.steps=25")
        run.steps(1, 25, 1.0, loss=lambda step: 1.0 if step in (1, 10, 20, 25) else Unread())
        assert [record["step"] for record in run.records] == [1, 10, 20, 25]
        assert len(run.lines) == 4
        assert run.lines[-1].startswith("step 25/25 | ")

    def test_what_is_unknown_is_left_out(self, start):
        run = start()
        run.step(1, 1.0, loss=1.5, learning_rate=None, grad_norm=None)
        assert run.lines == ["step  1/40 | loss 1.5000"]
        assert run.records[0]["grad_norm"] is None
        assert run.records[0]["learning_rate"] is None

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_diverged_loss_is_shown(self, start, loss):
        run = start()
        run.step(1, 1.0, loss=loss)
        assert run.records[0]["loss"] is None
        assert run.lines == ["step  1/40 | loss nan | grad norm 0.50 | lr 1.00e-03"]

    @pytest.mark.parametrize(
        ("tokens_per_second", "shown"), [(7, "7"), (999, "999"), (1234, "1.2k"), (5.67e6, "5.7M"), (8.9e9, "8.9G")]
    )
    def test_speeds(self, start, tokens_per_second, shown):
        run = start("run.log_interval=1")
        run.step(1, 1.0)
        run.step(2, TOKENS_PER_STEP / tokens_per_second)
        assert f" | {shown} tokens/s | " in run.lines[-1]

    @pytest.mark.parametrize(
        ("seconds", "shown"),
        [
            (1, "38s"), (2, "1m 16s"), (90 / 38, "1m 30s"), (100, "1h 03m"), (5000, "2d 4h"), (59.6 / 38, "1m 00s"),
            (86400 / 38, "1d 0h"), (0.01, "0s"),
        ],
    )  # fmt: skip
    def test_times_left(self, start, seconds, shown):
        """38 steps are left."""
        run = start("run.log_interval=1")
        run.step(1, 1.0)
        run.step(2, seconds)
        assert run.lines[-1].endswith(f" | {shown} left")


class TestEvaluations:
    def test_record_and_line(self, start):
        run = start()
        run.steps(1, 20, 1.0)
        run.evaluate(lm_loss=2.25, recall_accuracy=0.875)
        assert run.records[-1] == {"step": 20, "validation_loss": 2.25, "accuracy": 0.875}
        assert run.lines[-1] == "  validation at step 20: loss 2.2500, recall accuracy 87.5%"

    def test_accuracy_has_the_name_of_the_data(self, start):
        run = start("data.text=a.txt")
        run.step(1, 1.0)
        run.progress.on_evaluation({"lm loss": 2.25, "next-token accuracy": 0.5})
        assert run.records[-1]["accuracy"] == 0.5
        assert run.lines[-1] == "  validation at step 1: loss 2.2500, next-token accuracy 50.0%"

    def test_their_time_and_that_of_saves_is_no_training_but_is_left(self, start):
        run = start("run.log_interval=1")
        run.steps(1, 5, 0.5)
        run.evaluate(seconds=60.0, lm_loss=2.0)
        run.clock.now += 40.0
        run.progress.on_save()
        run.steps(6, 10, 0.5)
        assert run.records[-1]["tokens_per_second"] == 1000
        assert run.lines[-1].endswith("| 1.0k tokens/s | 5m 15s left")  # 30 steps of 0.5 s, and of 10 s between them

    def test_without_losses_there_is_nothing_to_say(self, start):
        run = start()
        run.step(1, 1.0)
        run.progress.on_evaluation({})
        assert len(run.records) == 1

    def test_nobody_need_read_what_is_said(self, start):
        class Closed:
            def write(self, text):
                raise BrokenPipeError

        run = start("run.log_interval=1")
        run.progress.console = Closed()
        run.step(1, 1.0)
        run.step(2, 1.0)
        assert len(run.records) == 2

    def test_there_may_be_no_step_before(self, start):
        run = start()
        run.evaluate(lm_loss=2.0)
        assert run.lines == ["  validation at step 0: loss 2.0000"]
        assert run.finish()["final_validation"]["validation_loss"] == 2.0


def colours(image):
    """Share of an RGB image by colour."""
    pixels, counts = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(map(int, pixel)): count / counts.sum() for pixel, count in zip(pixels, counts, strict=True)}


BLUE, ORANGE, GRAY = (31, 119, 180), (255, 127, 14), (128, 128, 128)


class TestFinish:
    def test_summary(self, start, clock):
        run = start()
        run.step(1, 1.0, loss=4.0)
        run.steps(2, 10, 0.5)
        run.steps(11, 20, 0.5)
        run.evaluate(seconds=10.0, lm_loss=2.5, recall_accuracy=0.25)
        run.step(21, 7.0)
        run.steps(22, 40, 1.0, loss=lambda step: 60.0 / step)
        run.evaluate(seconds=1.5, lm_loss=1.75, recall_accuracy=0.5)
        summary = run.finish()
        assert summary == {
            "run": "small",
            "pattern": "C-*-",
            "parameters": 1_234_567,
            "device": "cpu",
            "layers": "local",
            "first_step_of_this_start": 1,
            "steps": 40,
            "final_loss": 1.5,
            "final_validation": {"step": 40, "validation_loss": 1.75, "accuracy": 0.5},
            "accuracy_name": "recall accuracy",
            "chance_loss": 2.0,
            # Of 1000 at steps 10 and 20, and 500 at 30 and 40: the upper middle.
            "median_tokens_per_second": 1000.0,
            "peak_memory_bytes": None,
            "seconds_of_this_start": 1.0 + 9.5 + 10.0 + 7.0 + 19.0 + 1.5,
        }
        assert run.lines[-3:] == [
            "trained 1,234,567 parameters to step 40; final loss 1.5000 nats (chance: 2.0000)",
            "validation loss 1.7500 nats, recall accuracy 50.0%",
            "loss curve runs/small/loss.png, summary runs/small/summary.json",
        ]

    def test_without_validation(self, start):
        run = start()
        run.steps(1, 40, 1.0)
        assert run.finish()["final_validation"] is None
        assert run.lines[-2].startswith("trained ")

    def test_loss_curve(self, start):
        run = start()
        run.steps(1, 40, 1.0, loss=lambda step: 4.0 - step / 20)
        run.evaluate(lm_loss=2.0)
        run.finish()
        with Image.open(run.folder.loss_curve) as image:
            assert (image.format, image.size) == ("PNG", (1200, 675))
            found = colours(image)
        assert 0.5 < found[255, 255, 255] < 0.99
        for colour in (BLUE, ORANGE, GRAY):
            assert found.get(colour, 0) > 1e-4

    def test_loss_curve_shows_what_there_is(self, start):
        run = start()
        run.steps(1, 40, 1.0)
        run.finish()
        with Image.open(run.folder.loss_curve) as image:
            found = colours(image)
        assert found[BLUE] > 1e-4
        assert ORANGE not in found  # no validation

    def test_loss_curve_has_the_shape_of_the_losses(self, start):
        """A falling loss starts high on the left and ends low on the right."""
        run = start("run.log_interval=1")
        run.steps(1, 40, 1.0, loss=lambda step: 5.0 - step / 10)
        run.finish()
        with Image.open(run.folder.loss_curve) as image:
            pixels = np.asarray(image.convert("RGB"))
        rows, columns = np.nonzero((pixels == BLUE).all(-1))
        in_axes = columns < 900  # the legend is at the right
        rows, columns = rows[in_axes], columns[in_axes]
        left, right = rows[columns < columns.min() + 50], rows[columns > columns.max() - 50]
        assert left.max() < right.min()

    def test_with_losses_that_are_no_numbers(self, start):
        run = start()
        run.steps(1, 40, 1.0, loss=lambda step: math.nan if step > 5 else 1.0)
        assert run.finish()["final_loss"] is None
        assert "NaN" not in run.folder.metrics.read_text() + run.folder.summary.read_text()
        with Image.open(run.folder.loss_curve) as image:
            assert image.size == (1200, 675)

    def test_nothing_trained_nothing_written(self, start):
        run = start()
        run.progress.finish(parameters=1, device="cpu", layers="local")
        assert sorted(file.name for file in run.folder.path.iterdir()) == ["recipe.yaml"]
        assert run.lines == []


class TestResuming:
    def test_the_steps_after_the_checkpoint_are_recorded_anew(self, start):
        killed = start("run.log_interval=5")
        killed.steps(1, 20, 1.0, loss=lambda step: 5.0)
        killed.evaluate(lm_loss=4.0)
        # From the checkpoint at step 12, with lines at other steps.
        resumed = start("run.log_interval=7", first_step=13)
        resumed.steps(13, 40, 1.0, loss=lambda step: 1.0)
        history = read_metrics(resumed.folder.metrics)
        assert [(r["step"], r["loss"]) for r in history if "loss" in r] == [
            (1, 5.0), (5, 5.0), (10, 5.0), (14, 1.0), (21, 1.0), (28, 1.0), (35, 1.0), (40, 1.0),
        ]  # fmt: skip
        assert len(resumed.records) == len(history) == 8  # the old validation at step 20 is gone too
        summary = resumed.finish()
        assert (summary["first_step_of_this_start"], summary["steps"]) == (13, 40)
        assert summary["seconds_of_this_start"] == 28.0

    def test_nothing_is_forgotten_before_there_is_something_new(self, start):
        killed = start()
        killed.steps(1, 20, 1.0)
        before = killed.folder.metrics.read_bytes()
        start(first_step=11).steps(11, 19, 1.0)
        assert killed.folder.metrics.read_bytes() == before

    def test_later_records_of_repeated_steps_count(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text(
            '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 2, "validation_loss": 4.5}\n'
            '{"step": 2, "loss": 3.0}\n{"step": 2, "validation_loss": 3.5}\n{"step": 1, "loss": 6.0}\n'
        )
        assert read_metrics(path) == [
            {"step": 1, "loss": 6.0}, {"step": 2, "validation_loss": 3.5}, {"step": 2, "loss": 3.0}
        ]  # fmt: skip

    def test_a_finished_run_can_be_summed_up_later(self, start):
        """It was killed between its last checkpoint and its summary."""
        killed = start()
        killed.steps(1, 40, 1.0, loss=lambda step: 1.5)
        late = start(first_step=41)
        late.progress.finish(parameters=None, device="cpu", layers="local")
        summary = json.loads(late.folder.summary.read_text())
        assert (summary["steps"], summary["final_loss"], summary["parameters"]) == (40, 1.5, None)
        assert late.lines[0] == "trained to step 40; final loss 1.5000 nats (chance: 2.0000)"
        assert late.folder.loss_curve.is_file()

    def test_a_torn_last_line_is_ignored(self, start):
        run = start()
        run.steps(1, 10, 1.0)
        whole = run.folder.metrics.read_text()
        run.folder.metrics.write_text(whole + '{"step": 20, "loss": 2.')
        assert [record["step"] for record in read_metrics(run.folder.metrics)] == [1, 10]

    def test_the_record_after_a_torn_line_counts(self, start):
        killed = start()
        killed.steps(1, 10, 1.0)
        with killed.folder.metrics.open("a") as file:
            file.write('{"step": 20, "loss": 2.')
        start(first_step=11).steps(11, 30, 1.0)
        assert [record["step"] for record in read_metrics(killed.folder.metrics)] == [1, 10, 20, 30]

    def test_records_keep_the_order_of_steps(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 9, "loss": 1.0}\n\n{"step": 2, "loss": 3.0}\n{"step": 2, "validation_loss": 2.0}\n')
        history = read_metrics(path)
        assert sorted(r["step"] for r in history) == [r["step"] for r in history] == [2, 2, 9]


class TestOtherProcesses:
    def test_without_losses(self, start):
        """Not the last pipeline stage."""
        run = start()
        for iteration in range(1, 41):
            run.progress.on_step(iteration, {}, 1e-3, 0.5)
        run.progress.on_evaluation({})
        run.progress.finish(parameters=1, device="cpu", layers="local")
        assert sorted(file.name for file in run.folder.path.iterdir()) == ["recipe.yaml"]
        assert run.lines == []

    @pytest.mark.parametrize(("rank", "writes"), [(0, False), (2, False), (3, True)])
    def test_only_the_last_process_writes(self, start, monkeypatch, rank, writes):
        """Of several with losses, which tensor and data parallelism make."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
        run = start()
        run.steps(1, 40, 1.0, loss=lambda step: 1.0 if writes else Unread())
        run.evaluate(lm_loss=1.0)
        run.progress.finish(parameters=1, device="cpu", layers="local")
        written = sorted(file.name for file in run.folder.path.iterdir())
        if writes:
            assert written == ["loss.png", "metrics.jsonl", "recipe.yaml", "summary.json"]
            assert len(run.records) == 6
        else:
            assert written == ["recipe.yaml"]
            assert run.lines == []
