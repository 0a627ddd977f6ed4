"""The page of all recipe keys is what the docstrings say."""

from pathlib import Path

from megatron_carve import train
from megatron_carve.recipe import load_recipe, reference
from megatron_carve.recipe.loading import _all_keys


def test_the_page_is_current():
    page = Path(__file__).parents[2] / "docs/recipe.md"
    assert page.read_text(encoding="utf-8") == reference.page(), (
        "docs/recipe.md: run `python -P -m megatron_carve.recipe.reference > docs/recipe.md`"
    )


def test_help_lists_every_key(capsys):
    assert train.main(["--help"]) == 0
    said = capsys.readouterr().out
    for key in set(_all_keys()) - {name for name, _, _ in reference.sections()}:
        assert f"  {key}" in said
    assert "  mixer.erase=diagonal  [one of diagonal, delta]\n      CARVE: diagonal decays" in said
    assert "  model.hidden_size (must be given)  [" in said
    assert max(map(len, said.split("\n\nEvery key:")[1].splitlines())) <= 140


def test_a_recipe_is_printed_and_loads_again(capsys, tmp_path):
    words = ["carve_1p3b_hybrid", "training.lr=5e-4", "--print"]
    assert train.main(words) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(str(printed)) == load_recipe("carve_1p3b_hybrid", ["training.lr=5e-4"])
    assert load_recipe(str(printed)).training.lr == 5e-4
    assert train.main(["carve_1p3b_hybrid", "--print", "training.lear=1"]) == 2
    assert "training.lear" in capsys.readouterr().err
    assert train.main(["--print"]) == 2


def test_every_key_is_there_with_its_default():
    found = {f"{section}.{key.name}": key for section, _, keys in reference.sections() for key in keys}
    of_sections = {name for name, _, _ in reference.sections()}
    assert set(_all_keys()) == found.keys() | of_sections
    assert found["mixer.erase"][1:3] == ("one of diagonal, delta", "diagonal")
    assert found["mixer.erase"].meaning.startswith("CARVE: diagonal decays every key channel by 1 - b")
    assert found["model.hidden_size"].default is None
    assert found["data.recall.num_pairs"].type == "an integer"
