"""A run's folder: whole checkpoints are told from damaged ones, the same model from another, and nothing is touched."""

import argparse
import errno
import json
import logging
import os
import pickle
import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint

from megatron_carve.recipe import load_recipe
from megatron_carve.run.folder import MODEL_ARGUMENTS, CheckpointError, RunFolder, architecture, new_folder

SMALL = """\
model:
  pattern: C-*-2-*-
  hidden_size: 64
  ffn_hidden_size: 160
  num_attention_heads: 4
  attention_window: 32
mixer: {num_key_heads: 2, num_value_heads: 4, key_head_dim: 8, value_head_dim: 8, content_rank: 4}
data: {recall: {num_keys: 9, num_values: 8, num_pairs: 4}}
training: {steps: 10, seq_length: 128}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*overrides):
    return load_recipe("small.yaml", overrides)


def save_checkpoint(folder, step):
    """A checkpoint in the form of Megatron's: torch's distributed format, metadata.json, and the tracker file."""
    place = folder.checkpoints / f"iter_{step:07d}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(
            {"weight": torch.arange(500.0), "bias": torch.ones(3)}, checkpoint_id=place, no_dist=True
        )
    (place / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))
    return place


@pytest.fixture
def folder():
    """A run with a checkpoint at step 7."""
    run = RunFolder(recipe().run.path)
    run.save_recipe(recipe())
    save_checkpoint(run, 7)
    return run


def contents(path):
    """Bytes and times of everything in a folder."""
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else None)
        for file in [path, *path.rglob("*")]
    }


def refusal(folder, ask):
    """What `ask` says against the folder, which it must leave as it is."""
    before = contents(folder.path)
    with pytest.raises(CheckpointError) as error:
        ask()
    assert contents(folder.path) == before
    return str(error.value)


class TestPaths:
    def test_are_those_that_users_are_told(self):
        folder = RunFolder(recipe("run.folder=some/where", "run.name=it").run.path)
        assert [str(path) for path in (
            folder.path, folder.recipe, folder.checkpoints, folder.logs, folder.metrics, folder.summary,
            folder.loss_curve,
        )] == [
            "some/where/it", "some/where/it/recipe.yaml", "some/where/it/checkpoints", "some/where/it/logs",
            "some/where/it/metrics.jsonl", "some/where/it/summary.json", "some/where/it/loss.png",
        ]  # fmt: skip


class TestRecipe:
    def test_comes_back(self):
        folder, saved = RunFolder(recipe().run.path), recipe("training.lr=1e-3", "run.name=ä b")
        folder.save_recipe(saved)
        assert folder.saved_recipe() == saved
        assert [file.name for file in folder.path.iterdir()] == ["recipe.yaml"]

    def test_is_replaced_whole(self, folder):
        folder.save_recipe(recipe("training.lr=5e-5"))
        assert folder.saved_recipe().training.lr == 5e-5
        assert not list(folder.path.glob("*.partial"))

    def test_the_old_one_stays_if_writing_fails(self, folder, monkeypatch):
        def full(*args, **kwargs):
            raise OSError("no space left on device")

        before = folder.recipe.read_bytes()
        monkeypatch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space left"):
            folder.save_recipe(recipe("training.lr=5e-5"))
        assert folder.recipe.read_bytes() == before

    def test_may_be_gone(self, folder):
        folder.recipe.unlink()
        text = refusal(folder, folder.saved_recipe)
        assert text == f"{folder.checkpoints}: holds a checkpoint, but {folder.recipe}, its recipe, is gone"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("model: {patern: C-}\n", "unknown key model.patern; did you mean model.pattern?"),
            ("model: [\n", "not valid YAML"),
            (
                SMALL.replace("steps: 10", "steps: ten").replace("content_rank: 4", "erase: diagonal"),
                "training.steps: expected an integer or null, got 'ten'",
            ),
            ("model: 3\n", "model: expected"),
        ],
    )
    def test_may_be_unreadable(self, folder, text, reason):
        folder.recipe.write_text(text)
        found = refusal(folder, folder.saved_recipe)
        assert found.startswith(f"{folder.recipe}: cannot tell which model the checkpoint is of: ")
        assert reason in found
        assert "\n" not in found

    def test_of_carve_before_its_paper_was_known_is_refused_by_name(self, folder):
        text = folder.recipe.read_text().partition("\n")[2]  # below the checksum, which it had not
        new = ("erase", "prediction", "erase_bias", "short_convolution")
        folder.recipe.write_text(
            "".join(line for line in text.splitlines(keepends=True) if line.split(":")[0].strip() not in new)
        )
        found = refusal(folder, lambda: folder.check_same_model(recipe()))
        assert found.startswith(f"{folder.checkpoints}: the checkpoint is of CARVE as this package built it before")
        assert "no mixer.erase" in found and "train it anew" in found
        # however it was built
        folder.recipe.write_text(
            folder.recipe.read_text().replace("negative_eigenvalues: false", "negative_eigenvalues: true")
        )
        assert refusal(folder, lambda: folder.check_same_model(recipe())) == found
        # a model without the letter is what it was
        folder.recipe.write_text(folder.recipe.read_text().replace("C-*-2-*-", "2-*-2-*-"))
        assert folder.saved_recipe().model.pattern == "2-*-2-*-"

    def test_without_a_key_that_came_later_is_of_its_default(self, folder):
        _, *lines = folder.recipe.read_text().splitlines(keepends=True)  # the first has a checksum
        folder.recipe.write_text("".join(line for line in lines if "convolution_rank" not in line))
        assert folder.recipe.read_text().count("\n") == len(lines) - 1
        folder.check_same_model(recipe())
        found = refusal(folder, lambda: folder.check_same_model(recipe("mixer.short_convolution=dynamic")))
        assert "mixer.short_convolution" in found

    def test_is_utf8_whatever_the_locale(self, folder, monkeypatch):
        seen = []
        write = type(folder.recipe).write_text

        def spy(self, data, encoding=None, **options):
            seen.append(encoding)
            return write(self, data, encoding=encoding, **options)

        monkeypatch.setattr(type(folder.recipe), "write_text", spy)
        folder.save_recipe(recipe("run.name=ä"))
        assert seen == ["utf-8"]


class TestCheckpointStep:
    def test_of_a_whole_one(self, folder):
        before = contents(folder.path)
        assert folder.checkpoint_step() == 7
        assert contents(folder.path) == before

    def test_is_the_one_that_the_tracker_names(self, folder):
        save_checkpoint(folder, 12)
        assert folder.checkpoint_step() == 12
        (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("7\n")
        assert folder.checkpoint_step() == 7

    def test_an_unfinished_one_beside_it_does_not_matter(self, folder):
        (folder.checkpoints / "iter_0000009").mkdir()
        (folder.checkpoints / "iter_0000009" / "__0_0.distcp").write_bytes(b"begun")
        assert folder.checkpoint_step() == 7

    def test_no_folder_and_no_checkpoint(self, here):
        folder = RunFolder(here / "runs" / "new")
        assert folder.checkpoint_step() is None
        assert not folder.path.exists()
        folder.save_recipe(recipe())
        folder.checkpoints.mkdir()
        assert folder.checkpoint_step() is None

    @pytest.mark.parametrize("text", ["", "\n", "release", "7.5", "-7", "seven", "7 8"])
    def test_broken_tracker(self, folder, text):
        tracker = folder.checkpoints / "latest_checkpointed_iteration.txt"
        tracker.write_text(text)
        found = refusal(folder, folder.checkpoint_step)
        assert found == f"{tracker}: expected the step of a checkpoint, got {text.strip()!r}"

    def test_tracker_of_something_else(self, folder):
        (folder.checkpoints / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe\x00")
        assert "expected the step of a checkpoint" in refusal(folder, folder.checkpoint_step)

    @pytest.mark.parametrize("name", ["metadata.json", ".metadata"])
    def test_missing_description(self, folder, name):
        place = folder.checkpoints / "iter_0000007"
        (place / name).unlink()
        found = refusal(folder, folder.checkpoint_step)
        assert found == f"{place}: the checkpoint is incomplete: {name} is missing; it was left as it is"

    def test_a_checkpoint_of_megatron_fsdp_is_for_it_alone(self, folder):
        folder.check_format(7, fsdp=False)
        found = refusal(folder, lambda: folder.check_format(7, fsdp=True))
        assert "is Megatron's own, and training with megatron.use_megatron_fsdp=true does not read it" in found
        place = folder.checkpoints / "iter_0000008"
        save = torch.distributed.checkpoint.save
        save({"model": {"module": {"weight": torch.ones(3)}}}, checkpoint_id=place, no_dist=True)
        (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("8")
        assert folder.checkpoint_step() == 8  # it has no metadata.json
        folder.check_format(8, fsdp=True)
        found = refusal(folder, lambda: folder.check_format(8, fsdp=False))
        assert "is Megatron-FSDP's, and only training with megatron.use_megatron_fsdp=true reads it" in found

    def test_missing_checkpoint(self, folder):
        (folder.checkpoints / "latest_checkpointed_iteration.txt").write_text("8")
        found = refusal(folder, folder.checkpoint_step)
        assert found.startswith(f"{folder.checkpoints / 'iter_0000008'}: the checkpoint is incomplete: ")

    @pytest.mark.parametrize("damage", [b"", b"not a pickle", b"half"])
    def test_damaged_index(self, folder, damage):
        index = folder.checkpoints / "iter_0000007" / ".metadata"
        whole = index.read_bytes()
        index.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
        found = refusal(folder, folder.checkpoint_step)
        assert found.startswith(f"{index.parent}: the checkpoint's index .metadata is damaged: ")
        assert "\n" not in found

    def test_an_index_of_something_else(self, folder):
        index = folder.checkpoints / "iter_0000007" / ".metadata"
        index.write_bytes(pickle.dumps({"not": "an index"}))
        assert ".metadata is damaged" in refusal(folder, folder.checkpoint_step)

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
    def test_cut_data(self, folder, kept):
        (data,) = (folder.checkpoints / "iter_0000007").glob("*.distcp")
        whole = data.read_bytes()
        assert len(whole) > 2000  # the 503 float32 values
        data.write_bytes(whole[: int(kept * len(whole))])
        found = refusal(folder, folder.checkpoint_step)
        assert found == (
            f"{data.parent}: the checkpoint is incomplete: {data.name} is cut short "
            f"({int(kept * len(whole))} of {len(whole)} bytes); it was left as it is"
        )

    def test_one_byte_is_enough(self, folder):
        (data,) = (folder.checkpoints / "iter_0000007").glob("*.distcp")
        data.write_bytes(data.read_bytes()[:-1])
        assert "cut short" in refusal(folder, folder.checkpoint_step)

    def test_missing_data(self, folder):
        (data,) = (folder.checkpoints / "iter_0000007").glob("*.distcp")
        data.unlink()
        found = refusal(folder, folder.checkpoint_step)
        assert found == f"{data.parent}: the checkpoint is incomplete: {data.name} is missing; it was left as it is"


class TestSameModel:
    @pytest.mark.parametrize(
        "overrides",
        [
            [],
            ["model.pattern=C-*-|2-*-"],
            ["model.pattern=C-|*-|2-|*-", "parallel.pipeline=2"],
            ["training.lr=1e-5", "training.steps=99", "training.seed=3"],
            ["training.seq_length=256", "training.global_batch_size=64"],
            ["parallel.tensor=2", "parallel.overlap=false"],
            ["parallel.distributed_optimizer=false", "training.precision=fp32"],
            ["model.layers=local", "model.mixer_backend=torch", "model.mixer_recompute=true", "model.init_std=0.01"],
            ["mixer.content_grad=detached"],
            ["data.recall.num_pairs=2", "data.recall.num_overwrites=1"],
            ["checkpoint.interval=null", "run.log_interval=1", "run.name=other"],
            ["megatron.num_workers=0", "megatron.recompute_granularity=full", "megatron.log_throughput=true"],
            ["megatron.exit_interval=5", "megatron.wandb_project=mine", "megatron.attention_backend=flash"],
        ],
        ids=" ".join,
    )
    def test_passes(self, folder, overrides):
        before = contents(folder.path)
        folder.check_same_model(recipe(*overrides))
        assert contents(folder.path) == before

    @pytest.mark.parametrize(
        ("override", "key", "theirs", "ours"),
        [
            ("model.hidden_size=128", "model.hidden_size", 64, 128),
            ("model.ffn_hidden_size=161", "model.ffn_hidden_size", 160, 161),
            ("model.pattern=C-*-C-*-", "model.pattern", "C-*-2-*-", "C-*-C-*-"),
            ("model.pattern=C-*-2-*-/C-", "model.pattern", "C-*-2-*-", "C-*-2-*-/C-"),
            ("model.num_attention_heads=2", "model.num_attention_heads", 4, 2),
            ("model.num_query_groups=2", "model.num_query_groups", None, 2),
            ("model.attention_window=null", "model.attention_window", 32, None),
            ("model.attention_convolution=static", "model.attention_convolution", "none", "static"),
            ("model.position_embedding=none", "model.position_embedding", "rope", "none"),
            ("model.vocab_size=50", "model.vocab_size", None, 50),
            ("model.vocab_multiple=64", "model.vocab_multiple", 128, 64),
            ("model.tie_embeddings=true", "model.tie_embeddings", False, True),
            ("mixer.content_rank=8", "mixer.content_rank", 4, 8),
            ("mixer.content_chunk=128", "mixer.content_chunk", 64, 128),
            ("mixer.conv_bias=true", "mixer.conv_bias", False, True),
            ("mixer.decay_projection=full_rank", "mixer.decay_projection", "low_rank", "full_rank"),
            ("mixer.key_head_dim=16", "mixer.key_head_dim", 8, 16),
            ("data.recall.num_keys=10", "data.recall.num_keys", 9, 10),
            ("megatron.rotary_percent=0.5", "megatron.rotary_percent", None, 0.5),
        ],
    )
    def test_one_difference_is_listed_with_both_values(self, folder, override, key, theirs, ours):
        found = refusal(folder, lambda: folder.check_same_model(recipe(override)))
        assert found == (
            f"{folder.checkpoints}: the checkpoint is of another model ({key} is {theirs!r} there and {ours!r} here); "
            "choose another run.name, or change the recipe back"
        )

    def test_all_differences_are_listed(self, folder):
        other = recipe("model.hidden_size=128", "mixer.content_rank=8", "training.lr=1")
        found = refusal(folder, lambda: folder.check_same_model(other))
        assert "model.hidden_size is 64 there and 128 here; mixer.content_rank is 4 there and 8 here)" in found
        assert "training.lr" not in found

    def test_another_tokenizer(self, here):
        text = ["data.text=a.txt", "run.name=text"]
        folder = RunFolder(recipe(*text).run.path)
        folder.save_recipe(recipe(*text))
        folder.check_same_model(recipe("data.text=b.txt"))
        folder.check_same_model(recipe("data.indexed=[c]"))
        found = refusal(folder, lambda: folder.check_same_model(recipe(*text, "data.tokenizer=tiktoken:gpt2")))
        assert "(data.tokenizer is 'bytes' there and 'tiktoken:gpt2' here)" in found

    def test_text_after_recall(self, folder):
        found = refusal(folder, lambda: folder.check_same_model(recipe("data.text=a.txt")))
        assert "(data.tokenizer is None there and 'bytes' here" in found
        assert "data.recall.num_keys is" in found

    def test_megatrons_arguments_that_make_a_model_may_not_change(self, folder):
        found = refusal(folder, lambda: folder.check_same_model(recipe("megatron.rotary_percent=0.5")))
        assert "(megatron.rotary_percent is None there and 0.5 here)" in found
        found = refusal(folder, lambda: folder.check_same_model(recipe("megatron.swiglu=false")))
        assert "(megatron.swiglu is None there and False here)" in found

    @pytest.mark.parametrize(
        "option",
        [
            "recompute_granularity=selective", "num_workers=1", "save_retain_interval=10", "skip_train=true",
            "cross_entropy_loss_fusion=true", "optimizer_cpu_offload=true", "loss_scale=1024", "decoupled_lr=1e-4",
            "optimizer=sgd", "hidden_dropout=0.1", "moe_aux_loss_coeff=0.1", "use_precision_aware_optimizer=true",
        ],
    )  # fmt: skip
    def test_other_arguments_may(self, folder, option):
        folder.check_same_model(recipe(f"megatron.{option}"))

    def test_megatron_has_the_arguments_that_make_a_model(self):
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        known = [action.dest for action in parser._actions]
        for beginning in MODEL_ARGUMENTS:
            assert any(name.startswith(beginning) for name in known), beginning

    def test_mixer_options_do_not_matter_without_mixers(self):
        plain = recipe("model.pattern=-*-*", "run.name=plain")
        folder = RunFolder(plain.run.path)
        folder.save_recipe(plain)
        folder.check_same_model(recipe("model.pattern=-*-*", "mixer.content_rank=8"))

    def test_missing_recipe(self, folder):
        folder.recipe.unlink()
        assert "its recipe, is gone" in refusal(folder, lambda: folder.check_same_model(recipe()))

    def test_architecture_names_recipe_keys(self):
        values = recipe().to_dict()
        for key, value in architecture(recipe()).items():
            found = values
            for part in key.split("."):
                found = found[part]
            assert found == value


HOLDS = """
import sys, time
from pathlib import Path
from megatron_carve.run.folder import RunFolder
lock = RunFolder(Path(sys.argv[1])).lock()
print("locked", flush=True)
time.sleep(100)
"""


class TestLock:
    def test_another_program_is_named_and_one_that_was_killed_does_not_block(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        with subprocess.Popen([sys.executable, "-c", HOLDS, folder.path], stdout=subprocess.PIPE, text=True) as other:
            try:
                assert other.stdout.readline() == "locked\n"
                with pytest.raises(
                    CheckpointError, match=rf"another program trains in this run \(process {other.pid} on"
                ):
                    folder.lock()
            finally:
                other.kill()
        with folder.lock():
            assert (folder.path / ".lock").read_text().startswith(f"process {os.getpid()} on ")

    def test_storage_without_locks_is_said(self, tmp_path, monkeypatch, caplog):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.lockf", refuse)
        with caplog.at_level(logging.INFO, logger="megatron_carve"), RunFolder(tmp_path / "run").lock():
            assert "this storage has no locks (No locks available)" in caplog.text


class TestNewFolder:
    def test_it_is_there_when_all_went_well(self, tmp_path):
        (tmp_path / "out" / ".partial" / "of a killed program").mkdir(parents=True)
        with new_folder(tmp_path / "out") as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "file").write_text("1")
            assert not (tmp_path / "out" / "deep").exists()
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["deep"]
        assert (tmp_path / "out" / "deep" / "file").read_text() == "1"

    @pytest.mark.parametrize("there", [False, True])
    def test_nothing_is_when_it_failed(self, tmp_path, there):
        if there:
            (tmp_path / "out").mkdir()
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
            (partial / "file").write_text("1")
            raise KeyboardInterrupt
        assert (tmp_path / "out").exists() is there and not list(tmp_path.glob("out/*"))

    def test_what_is_there_stays(self, tmp_path):
        (tmp_path / "file").write_text("1")
        for path in (tmp_path, tmp_path / "file"):
            with pytest.raises(FileExistsError, match="expected a new or empty folder"), new_folder(path):
                pass
        assert (tmp_path / "file").read_text() == "1"


@pytest.mark.parametrize(
    ("optimizer", "refused"),
    [
        ([], False),
        (["megatron.optimizer=muon"], True),
        (["parallel.distributed_optimizer=false", "training.precision=fp32"], True),
    ],
)
def test_only_some_optimizers_go_on_with_experts_on_another_number_of_ranks(monkeypatch, here, optimizer, refused):
    index = SimpleNamespace(state_dict_metadata={"optimizer.state.exp_avg.decoder": None})
    monkeypatch.setattr("megatron_carve.run.folder._index", lambda _: index)
    words = ["model.pattern=C-*E", "megatron.num_experts=4", *optimizer]
    folder = RunFolder(here / "runs/run")
    folder.save_recipe(recipe(*words))
    folder.check_optimizer(3, recipe(*words, "megatron.expert_model_parallel_size=1"))
    spread = recipe(*words, "megatron.expert_model_parallel_size=2")
    message = "expert_model_parallel_size is 1 there and 2 here; only with adam and"
    with pytest.raises(CheckpointError, match=message) if refused else nullcontext():
        folder.check_optimizer(3, spread)
