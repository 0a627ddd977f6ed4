"""AutoBridge between our exported folders and Megatron-Bridge: the same weights, the same logits, and its checks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bridge import alone, logits, pretrain
from support.forks import checked, run_forked
from support.programs import program

IDS = torch.randint(257, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def out(folder, text_run):
    """The folder that AutoBridge exports the run to, by its own calls."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_model_config

    from megatron_carve.bridge.conversion import reference_folder

    provider, _ = load_model_config(str(text_run / "checkpoints" / "iter_0000002"))
    assert reference_folder(provider, folder / "reference") == []
    with alone():
        bridge = AutoBridge.from_auto_config(
            str(text_run / "checkpoints"), str(folder / "reference"), trust_remote_code=True
        )  # fmt: skip
        bridge.export_ckpt(text_run / "checkpoints", folder / "out", show_progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def exported(folder, text_run):
    """The folder that our own program exports it to."""
    program(folder, "export", str(text_run), "exported")
    return folder / "exported"


def test_autobridge_exports_what_our_program_does(out, exported):
    theirs, ours = (load_file(place / "model.safetensors") for place in (out, exported))
    assert theirs.keys() == ours.keys()
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=0, msg=name)
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (out, exported))
    del theirs["transformers_version"]
    ours["recipe"]["model"]["mixer_backend"] = "auto"  # our program has chosen the backend of the CPU
    assert theirs == {**ours, "step": 0, "dtype": theirs["dtype"]}


def test_transformers_computes_the_same_of_it(out, text_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        theirs = model(IDS).logits
    torch.testing.assert_close(theirs, logits(text_run, IDS), rtol=1e-4, atol=2e-4)
    assert AutoTokenizer.from_pretrained(out)("cat").input_ids == [99, 97, 116]


def test_autobridge_imports_our_exported_folder(folder, exported, text_run):
    from megatron.bridge import AutoBridge

    with alone():
        AutoBridge.import_ckpt(exported, folder / "imported", trust_remote_code=True)
    again = AutoBridge.from_hf_pretrained(exported, trust_remote_code=True)
    again.export_ckpt(folder / "imported", folder / "again", show_progress=False, strict=True)
    ours, theirs = (load_file(place / "model.safetensors") for place in (exported, folder / "again"))
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=0, msg=name)


def test_its_model_of_our_folder_computes_the_same(exported, text_run):
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(exported, trust_remote_code=True)
    provider = bridge.to_megatron_provider()
    provider.finalize()
    with alone(), torch.no_grad():
        model = provider.provide_distributed_model(wrap_with_ddp=False)[0].eval()
        theirs = model(IDS, torch.arange(IDS.shape[1]).expand_as(IDS), None)
    torch.testing.assert_close(theirs, logits(text_run, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("model.layers.0.mixer.A_log"), "model.layers.0.mixer.A_log is missing"),
        (lambda w: w.update(other=torch.zeros(1)), "there is no place for other in this model"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"decoder.final_norm.weight of shape \(32,\), got"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tmp_path, exported, change, complaint):
    from megatron.bridge import AutoBridge

    bad = tmp_path / "bad"
    shutil.copytree(exported, bad)
    weights = load_file(bad / "model.safetensors")
    change(weights)
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    with alone(), pytest.raises(ValueError, match=complaint):
        AutoBridge.import_ckpt(bad, tmp_path / "imported", trust_remote_code=True)


def test_a_run_without_a_tokenizer_is_exported(folder, tmp_path):
    """Where AutoBridge's own export_ckpt wants one."""
    from megatron_carve.bridge.conversion import export
    from megatron_carve.bridge.recipes import pretrain_config

    pretrain(
        pretrain_config(
            str(folder / "tiny.yaml"), "run.name=recall", f"run.folder={folder / 'runs'}", "training.steps=2"
        )
    )  # fmt: skip
    run = folder / "runs" / "recall"
    with alone():
        export(run / "checkpoints", tmp_path / "out")
    program(folder, "import", str(tmp_path / "out"), str(tmp_path / "back"))
    ids = IDS % 64
    torch.testing.assert_close(logits(tmp_path / "back", ids), logits(run, ids), rtol=0, atol=0)


def test_what_megatron_bridge_has_not_saved_is_refused(text_run, tmp_path):
    from megatron_carve.bridge.conversion import export

    ours = tmp_path / "checkpoints" / "iter_0000002"
    shutil.copytree(text_run / "checkpoints" / "iter_0000002", ours)
    (ours / "run_config.yaml").unlink()
    for checkpoints, said in ((ours.parent, ours), (tmp_path, tmp_path)):
        with pytest.raises(ValueError, match=f"{said}: expected a checkpoint of Megatron-Bridge"):
            export(checkpoints, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SPREAD = """
import sys
import torch
from megatron_carve.bridge import prepare

prepare("cpu")
from megatron.bridge import AutoBridge

source, out = sys.argv[1:]
torch.distributed.init_process_group("gloo")
bridge = AutoBridge.from_hf_pretrained(source, trust_remote_code=True)
provider = bridge.to_megatron_provider()
provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = 2, 2
provider.finalize()
provider.initialize_model_parallel(seed=0)
model = provider.provide_distributed_model(wrap_with_ddp=False)
assert model[0].config.tensor_model_parallel_size == 2
bridge.save_hf_pretrained(model, out, show_progress=False)
torch.distributed.destroy_process_group()
"""


def test_weights_are_spread_over_ranks_and_gathered(folder, exported):
    (folder / "spread.py").write_text(SPREAD)
    checked(
        run_forked(
            [str(folder / "spread.py"), str(exported), str(folder / "spread")], processes=4, cwd=folder, timeout=560
        )
    )
    ours, theirs = (load_file(place / "model.safetensors") for place in (exported, folder / "spread"))
    assert theirs.keys() == ours.keys()
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=0, msg=name)
