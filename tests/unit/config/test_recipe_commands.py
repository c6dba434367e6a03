"""The commands in the heads of fine-tuning recipes and in their document: packs are as the document of sources states
them, and settings exist."""

from pathlib import Path

import pytest
from doc_lines import command_lines

import launch
from uniemox_dist.config.load import load_config

ROOT = Path(__file__).parents[3]
RECIPES = sorted((Path(launch.__file__).parent / "recipes").glob("finetune_*.yaml"))


def commands_of(recipe: Path) -> list[list[str]]:
    """The words of the commands in a recipe's head, without `uniemox`."""
    lines = [line.removeprefix("#   uniemox ") for line in recipe.read_text().splitlines()]
    return [line.split() for line in lines if line.startswith(("shards ", "finetune "))]


def words_of(document: str, start: str) -> list[list[str]]:
    lines = command_lines((ROOT / document).read_text(encoding="utf-8"))
    return [words for words in lines if " ".join(words).startswith(start)]


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_a_set_is_packed_in_its_recipe_as_in_the_document_of_sources(recipe: Path) -> None:
    pack, tune = commands_of(recipe)
    documented = words_of("shards/sources/README.md", "shards pack")
    assert pack in [[*words[:3], "DATA", *words[4:]] for words in documented]
    assert tune == ["finetune", recipe.stem, "data.path=DATA", "model.init_from=RELEASE"]
    if recipe.stem != "finetune_emotion6_ldl":
        row = f"| `{recipe.stem}` |"
        [line] = [x for x in (ROOT / "docs/finetune.md").read_text().splitlines() if x.startswith(row)]
        assert f"`{' '.join(pack[4:])}`" in line


def test_the_settings_of_documented_runs_exist() -> None:
    runs = words_of("docs/finetune.md", "finetune")
    assert len(runs) == 3
    for _, recipe, *settings in runs:
        own = [word for word in settings if "=" in word and not word.startswith("model.init_from=")]
        config = load_config(recipe, own)
        assert config.data.path == next(word for word in own if word.startswith("data.path="))[10:]
