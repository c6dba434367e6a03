"""From recipes and key=value pairs to a checked configuration, with every mistake reported at once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shards.format.manifest import Manifest
from uniemox_dist.cli.main import run
from uniemox_dist.config.load import (
    dump_yaml,
    list_shipped_recipes,
    load_config,
    merge,
    parse_override,
    read_recipe,
)
from uniemox_dist.config.schema import Config
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError

SMALL = "run: {max_steps: 1}\ndata: {path: x}\nteacher: {name: shipped:demo}\n"


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(SMALL)
    return str(tmp_path / "small.yaml")


def complaint(recipe: str, *overrides: str) -> list[str]:
    """The error's lines, without the recipe's name."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return [line.removeprefix(f"{recipe}: ") for line in str(caught.value).splitlines()]


# ---- mistakes


def test_every_mistake_of_a_recipe_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "run: {max_steps: 1, sed: 4, log_every: 0}\n"
        "data: {sources: [{path: a, wieght: 2}, {path: b, weight: -1}, {}]}\n"
        "optim: {blr: fast}\n"
        "batch: {global_batch: 100, streams: 12}\n"
        "modle: {}\n"
    )
    assert sorted(complaint(str(path))) == sorted(
        [
            "run.log_every=0: input should be greater than 0",
            "run.sed: unknown key; did you mean run.seed?",
            "data.sources.0.wieght: unknown key; did you mean data.sources.0.weight?",
            "data.sources.1.weight=-1: input should be greater than 0",
            "data.sources.2.path: required, but not given",
            "optim.blr='fast': input should be a valid number, unable to parse string as a number",
            "batch.global_batch=100 is not a multiple of batch.streams=12; try 96, or a batch.streams that divides 100",
            "modle: unknown key; did you mean model?",
        ]
    )


def test_a_key_like_no_other_lists_the_known_ones(small: str) -> None:
    assert complaint(small, "zero.xyz=1") == ["zero.xyz: unknown key; known: stage"]
    [line] = complaint(small, "xyz=1")
    assert (
        line
        == "xyz: unknown key; known: run, data, batch, model, teacher, loss, optim, zero, compute, deepspeed"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.epochs=2", "give one of run.max_steps=1 and run.epochs=2.0; set the other one to null"),
        ("run.max_steps=null", "give one of run.max_steps=None and run.epochs=None"),
        ("data.path=null", "give either data.path (one folder) or data.sources (a list of path and weight)"),
        ("data.sources=[{path: y}]", "give either data.path (one folder) or data.sources (a list of path and weight)"),
        ("data.scene_scale=[0.5,0.2]", "data.scene_scale=(0.5, 0.2): needs 0 < smallest <= largest <= 1"),
        (
            "batch.streams=7",
            "batch.global_batch=768 is not a multiple of batch.streams=7; try 770, or a batch.streams that divides 768",
        ),
        ("model.image_size=100", "model.image_size=100 is not a multiple of model.patch_size=16; try 96 or 112"),
        ("model.width=50", "model.width=50 must be a multiple of 4 and of model.heads=12"),
        ("model.decoder_heads=7", "model.decoder_width=512 must be a multiple of 4 and of model.decoder_heads=7"),
        ("model.mask_ratio=0.999", "model.mask_ratio=0.999 leaves 0 of 196 patches visible"),
        ("zero.stage=4", "zero.stage=4: input should be 0, 1, 2 or 3"),
        ("model.mask_ratio=0", "model.mask_ratio=0: input should be greater than 0"),
        ("model.mask_ratio=1", "model.mask_ratio=1: input should be less than 1"),
        ("loss.schedule.relation=[[0.5, 1], [0.2, 0]]", "loss.schedule.relation=((0.5, 1.0), (0.2, 0.0)): needs points "
         "with growing shares of the run"),
        ("loss.schedule.l1=[[0, 1]]", "loss.schedule.l1: there is no such loss; "
         "use relation, similarity, reconstruction"),
        ("data.person=smallest", "data.person='smallest': input should be 'largest', 'most_confident' or 'random'"),
        ("data.resize=nearest", "data.resize='nearest': input should be 'bicubic' or 'bilinear'"),
        ("run.name=../x", "run.name='../x': letters, digits, dots, - and _, and first a letter or digit"),
        ("run.epochs=.inf", "run.epochs=inf: input should be a finite number"),
        ("teacher.name=ViT-B-16", "teacher.name=ViT-B-16 is an open_clip model name and also needs teacher.weights, "
         "teacher.mean, teacher.std; or give teacher.name=local-dir:PATH"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_field_and_value_and_fix(override: str, line: str, small: str) -> None:
    assert complaint(small, override) == [line]


def test_no_loss_at_all_is_refused(small: str) -> None:
    pairs = [f"loss.{name}=0" for name in ("relation", "similarity", "reconstruction")]
    assert complaint(small, *pairs) == [
        "loss.relation, loss.similarity and loss.reconstruction are all 0; switch at least one on"
    ]


def test_the_configuration_is_frozen(small: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config(small).run.seed = 1  # type: ignore[misc]


# ---- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-2e+1", -20.0),
        (".5", 0.5),
        ("3", 3),
        ("1.", 1.0),
        ("true", True),
        ("on", "on"),
        ("no", "no"),
        ("1e", "1e"),
        ("12e4f", "12e4f"),
        ("[1e-3, x]", [1e-3, "x"]),
        ("null", None),
        ("2026.1.2", "2026.1.2"),
    ],
)
def test_numbers_and_words_are_read_as_people_write_them(text: str, value: Any) -> None:
    read = parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


def test_other_users_of_pyyaml_are_not_changed() -> None:
    assert yaml.safe_load("[1e-4, on]") == ["1e-4", True]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml: line 3: the key 'a' is given twice; keep one"),
        ("a:\n  b: 1\n  b: 1", "f.yaml: line 3: the key 'b' is given twice; keep one"),
        ("a: [1", "f.yaml: line 1 is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "f.yaml: line 1 is not valid YAML: mapping values are not allowed here"),
        ("? [a]\n: 1", "f.yaml: line 1: a key must be a word, not []"),
    ],
)
def test_broken_yaml_names_file_and_line(text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value) == line


def test_yaml_cannot_call_python() -> None:
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.getcwd []", "f.yaml")


def test_merge_keys_of_yaml_work() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "f")["b"] == {"x": 1, "y": 3}


# ---- recipes that extend others, and overrides


def test_a_recipe_beside_another_extends_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(SMALL + "optim: {blr: 1e-4, clip_grad: 1}\n")
    (tmp_path / "mid.yaml").write_text("extends: base\noptim: {blr: 2e-4}\n")
    (tmp_path / "top.yaml").write_text("extends: mid.yaml\nrun: {seed: 9}\n")
    config = load_config(str(tmp_path / "top.yaml"))
    assert (config.run.max_steps, config.run.seed) == (1, 9)
    assert (config.optim.blr, config.optim.clip_grad) == (2e-4, 1.0)


def test_a_recipe_extends_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: demo\nrun: {name: mine}\n")
    mine, demo = load_config(str(tmp_path / "mine.yaml")), load_config("demo")
    assert mine.run.name == "mine"
    assert mine.model_copy(update={"run": demo.run}) == demo


@pytest.mark.parametrize(("a", "b"), [("a", "-"), ("b", "a"), ("b.yaml", "../x/a")])
def test_recipes_that_extend_each_other_are_refused(a: str, b: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "a.yaml").write_text(f"extends: {a}\n")
    (folder / "b.yaml").write_text(f"extends: {b}\n")
    with pytest.raises(UserError, match=r"a\.yaml: extends itself: .*a\.yaml -> .*a\.yaml"):
        load_config(str(folder / "a.yaml"))


@pytest.mark.parametrize("base", ["[demo]", "3"])
def test_a_base_that_is_not_a_name_is_refused(base: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"extends: {base}\n")
    with pytest.raises(UserError, match=r"a\.yaml: extends=.* must name another recipe"):
        load_config(str(tmp_path / "a.yaml"))


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_config("nope")
    names = ", ".join(list_shipped_recipes())
    assert str(caught.value) == f"recipe nope: no such file, nor a shipped recipe; shipped are: {names}"


@pytest.mark.parametrize("content", [b"- 1", b"words", b"\xff\xfe\x00"])
def test_a_file_that_is_not_a_recipe_is_a_user_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.yaml: (a recipe is a mapping of sections|not a text in UTF-8)"):
        load_config(str(tmp_path / "r.yaml"))


def test_a_merge_is_deep_and_replaces_lists() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    assert merge(base, {"a": {"y": {"w": 3}}, "b": [3]}) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [3]}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}


def test_overrides_win_in_order(small: str) -> None:
    config = load_config(
        small, ["optim.blr=1e-3", "optim.blr=5e-4", "optim.betas=[0.8, 0.99]", "run.name=a.b"]
    )
    assert (config.optim.blr, config.optim.betas, config.run.name) == (5e-4, (0.8, 0.99), "a.b")
    assert (
        load_config(small, ["data.path=null", "data.sources=[{path: y, weight: 2}]"]).data.sources[0].weight
        == 2
    )
    nested = load_config(small, ["deepspeed.zero_optimization.overlap_comm=true"]).deepspeed
    assert nested == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize("pair", ["x", "=1", "1=2", "a b=1", ".a=1", "-a=1"])
def test_a_malformed_pair_is_refused(pair: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_override(pair)
    assert str(caught.value) == f"{pair}: expected key=value with a dotted key, such as optim.blr=1e-3"


def test_a_pair_may_hold_further_equals_signs_and_nothing() -> None:
    assert parse_override("data.path=a=b") == {"data": {"path": "a=b"}}
    assert parse_override("data.path=") == {"data": {"path": None}}


# ---- what is shipped, and what is written down


@pytest.mark.parametrize("name", list_shipped_recipes())
def test_every_shipped_recipe_resolves_and_survives_its_dump(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "dumped.yaml").write_text(dump_yaml(config))
    assert load_config(str(tmp_path / "dumped.yaml")) == config
    assert yaml.safe_load(dump_yaml(config)) == config.model_dump(mode="json")  # plain PyYAML agrees


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True))
def test_any_legal_name_survives_the_dump(name: str) -> None:
    values = {**yaml.safe_load(SMALL), "run": {"max_steps": 1, "name": name}}
    config = Config.model_validate(values)
    assert parse_yaml(dump_yaml(config), "x")["run"]["name"] == name
    assert yaml.safe_load(dump_yaml(config))["run"]["name"] == name


@pytest.mark.parametrize("name", ["1e3", "7e12345", "on", "null", "0x10", "1.5", "2026-01-02", "true", "1_0"])
def test_names_that_look_like_other_values_survive_the_dump(name: str) -> None:
    config = Config.model_validate({**yaml.safe_load(SMALL), "run": {"max_steps": 1, "name": name}})
    assert parse_yaml(dump_yaml(config), "x")["run"]["name"] == name


def test_every_setting_has_a_line_of_meaning() -> None:
    def undocumented(section: Any, path: str) -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                found += undocumented(field.annotation, f"{path}{name}.")
            elif not field.description:
                found.append(path + name)
        return found

    assert undocumented(Config, "") == []


def test_derived_sizes_follow_from_the_settings(small: str) -> None:
    model = load_config(small, ["model.image_size=96", "model.patch_size=8", "model.mask_ratio=0.75"]).model
    assert (model.patches, model.visible) == (144, 36)
    assert load_config(small, ["loss.relation=0", "loss.similarity=0"]).loss.needs_teacher is False


def test_the_configuration_needs_no_torch() -> None:
    code = "import sys, uniemox_dist.config.load as l; l.load_config('demo'); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "False\n"


# ---- the command


def test_a_dry_run_in_a_batch_script_does_not_ask_where_ranks_meet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert run(["pretrain", "demo", "--dry-run"]) == EXIT_DONE
    assert "global_batch: 96" in capsys.readouterr().out


def test_a_dry_run_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "demo", "--dry-run", "run.name=mine"]) == EXIT_DONE
    assert capsys.readouterr().out == dump_yaml(load_config("demo", ["run.name=mine"]))


def test_wrong_settings_end_with_2_and_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "demo", "--dry-run", "run.sed=1", "zero.stage=7"]) == EXIT_USER
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "uniemox: error: recipe demo: run.sed: unknown key; did you mean run.seed?",
        "uniemox: error: recipe demo: zero.stage=7: input should be 0, 1, 2 or 3",
    ]


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_pretraining_without_data_ends_with_2_and_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    if kind == "empty":
        Manifest((), {}).write(folder)
    assert (
        run(["pretrain", "demo", "--nproc", "2", f"data.path={folder}", f"run.dir={tmp_path}/runs"])
        == EXIT_USER
    )
    says = {
        "missing": "no such folder; build it with `uniemox shards pack`",
        "empty": "has no samples; pack a source with pictures",
    }[kind]
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert lines == [f"uniemox: error: data.path={folder}: {says}"]
    assert not (tmp_path / "runs").exists()


def test_reading_a_recipe_returns_its_values_and_name(small: str) -> None:
    values, name = read_recipe(small)
    assert name == small
    assert values == yaml.safe_load(SMALL)
