"""The page of all recipe keys is what the docstrings say."""

from pathlib import Path

from megatron_carve.recipe import reference
from megatron_carve.recipe.loading import _all_keys


def test_the_page_is_current():
    page = Path(__file__).parents[2] / "docs/recipe.md"
    assert page.read_text(encoding="utf-8") == reference.page(), (
        "docs/recipe.md: run `python -P -m megatron_carve.recipe.reference > docs/recipe.md`"
    )


def test_every_key_is_there_with_its_default():
    found = {f"{section}.{key.name}": key for section, _, keys in reference.sections() for key in keys}
    of_sections = {name for name, _, _ in reference.sections()}
    assert set(_all_keys()) == found.keys() | of_sections
    assert found["mixer.erase"][1:3] == ("one of diagonal, delta", "diagonal")
    assert found["mixer.erase"].meaning.startswith("CARVE: diagonal decays every key channel by 1 - b")
    assert found["model.hidden_size"].default is None
    assert found["data.recall.num_pairs"].type == "an integer"
