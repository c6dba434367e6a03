"""Fine-tuning on real ranks: the seven recipes, a set that can be learned, any number of ranks, kills and patience."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from handmade import config_of, write_checkpoint
from labelled_sets import (
    LAYOUTS,
    distribution_set,
    emotic_set,
    folder_set,
    heco_set,
    labels_set,
    packed,
    picture,
)
from PIL import Image
from published_sets import emotion6
from ranks import events, run_ranks

import launch
from shards.format.sample import DIMENSIONS
from shards.sources.layouts.emotic import CATEGORIES
from shards.sources.presets import load_presets
from uniemox_dist.cli.main import run
from uniemox_dist.core.files import sha256_file
from uniemox_dist.evaluate import metrics
from uniemox_dist.inference.inputs import Pictures
from uniemox_dist.inference.predict import load_classifier_predictor, predict
from uniemox_dist.models.student import Student
from uniemox_dist.release.classifier import load_classifier
from uniemox_dist.release.export import release

TINY = (
    "run.epochs=null",
    "run.log_every=1",
    "run.preflight=false",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=1",
    "optim.precision=fp32",
    "batch.streams=4",
    "data.workers=0",
    "model.name=null",
    "model.image_size=32",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
)
COLOURS = ("cyan", "green", "red", "violet")
RECIPES = {name: f"finetune_{name.replace('-', '_')}" for name in (*LAYOUTS, "emotic")}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labels that are colours: 16 training, 4 validation and 8 test pictures of each."""
    folder = tmp_path_factory.mktemp("colours")
    counts = {"train": 16, "val": 4, "test": 8}
    splits = {split: dict.fromkeys(COLOURS, count) for split, count in counts.items()}
    return packed(labels_set(folder / "source", splits), folder / "data")


def settings(folder: Path, data: Path, name: str, *more: str) -> list[str]:
    return [*TINY, f"run.dir={folder}", f"run.name={name}", f"data.path={data}", *more]


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows(found: dict[str, Any]) -> list[str]:
    return [row["label"] for row in found["per_class"]]


def test_each_recipe_runs_on_a_set_in_its_own_layout(tmp_path: Path) -> None:
    for name in LAYOUTS:
        packed(folder_set(tmp_path / "source" / name, name), tmp_path / name, preset=name)
    packed(emotic_set(tmp_path / "source/emotic"), tmp_path / "emotic", layout="emotic")
    # bf16 and a ZeRO stage each: as on a GPU.
    other = {"heco": "optim.precision=bf16", "emotic": "optim.precision=bf16", "fi": "zero.stage=2"}
    short = ("run.max_steps=2", "batch.global_batch=8", "batch.micro_batch=4")
    runs = [
        (
            recipe,
            settings(tmp_path / "runs", tmp_path / name, name, *short, other.get(name, "zero.stage=1")),
        )
        for name, recipe in RECIPES.items()
    ]
    # The last begins with the classifier that another run left: its encoder, not its labels.
    init = f"model.init_from={tmp_path}/runs/emo8/best"
    runs.append(("finetune_fi", settings(tmp_path / "runs", tmp_path / "fi", "again", *short, init)))
    heco = heco_set(tmp_path / "source/heco_persons")
    persons = tmp_path / "heco_persons"
    assert run(["shards", "pack", str(heco), str(persons), "--preset", "heco", "--persons", "source"]) == 0
    labels = "finetune.labels=[Surprise, Excitement, Happiness, Peace]"
    values = "finetune.dimensions=[valence, arousal, dominance]"
    runs.append(
        ("finetune_heco", settings(tmp_path / "runs", persons, "heco_persons", *short, labels, values))
    )
    (recipe, first), *more = runs
    assert run_ranks(first, world_size=1, recipe=recipe, more=more) == [0]
    for name in RECIPES:
        found = read(tmp_path / "runs" / name / "finetune.json")
        labels = list(CATEGORIES if name == "emotic" else load_presets()[name].labels)
        assert found["labels"] == rows(found["test"]) == rows(found["val"]) == labels
        for split in ("train", "val", "test"):
            whole = read(tmp_path / name / split / "manifest.json")["samples"] if name != "ube" else None
            if name == "emotic":  # every second picture has two persons
                assert found["samples"][split] == whole * 3 // 2
            elif name != "ube":
                assert found["samples"][split] == whole
            measured = found[split]["samples"] if split != "train" else found["samples"]["train"]
            assert measured == found["samples"][split]
    ube = read(tmp_path / "runs/ube/finetune.json")
    assert ube["samples"] == {"train": 42, "val": 6, "test": 12}  # a tenth of each label's 8, at least one
    assert "has no split val; 6 of its 48 training samples validate" in ube["remarks"][0]
    emotic = read(tmp_path / "runs/emotic/finetune.json")
    dimensions = emotic["test"]["dimensions"]
    assert [row["dimension"] for row in dimensions] == list(DIMENSIONS)
    assert [row["samples"] for row in dimensions] == [7, 9, 7]  # NaN left out
    assert "no sample has the label Aversion, Confidence" in emotic["remarks"][2]
    of_persons = read(tmp_path / "runs/heco_persons/finetune.json")
    assert of_persons["samples"]["train"] + of_persons["samples"]["val"] + of_persons["samples"]["test"] == 32
    assert [row["dimension"] for row in of_persons["test"]["dimensions"]] == list(DIMENSIONS)
    assert of_persons["dimension_ranges"] == {name: [1, 10] for name in DIMENSIONS}
    _check_folder(tmp_path / "runs/emo8/best", tmp_path / "source/emo8", labels=8)
    both = load_classifier_predictor(tmp_path / "runs/heco/best")
    some = Pictures(str(tmp_path / "source/heco/Anger/000.jpg"))
    [answer] = predict(both, some)
    assert set(answer["probabilities"]) == set(load_presets()["heco"].labels)
    init = events(tmp_path / "runs/again", "init")[0]
    assert set(init["missing"]) == {"head.weight", "head.bias"}
    assert init["layout"] == "a fine-tuned classifier"


def _check_folder(best: Path, source: Path, labels: int) -> None:
    """A classifier's folder has its hashes, and timm's answers are ours."""
    for line in (best / "SHA256SUMS").read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert sha256_file(best / name) == digest
    facts, config = read(best / "uniemox.json"), read(best / "config.json")
    assert (facts["format"], facts["task"]) == ("uniemox-classifier", "single")
    assert config["label_names"] == facts["labels"]
    plain = timm.create_model(f"local-dir:{best}", pretrained=True).eval()
    assert plain.num_classes == labels
    ours = load_classifier(best)
    picture = np.array(Image.open(sorted(source.rglob("*.jpg"))[0]).resize((32, 32)))
    scene = torch.from_numpy(picture).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(plain.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(plain((scene / 255 - mean) / std), ours(scene, None)[0])


def test_results_do_not_depend_on_ranks_or_on_a_kill(tmp_path: Path, colours: Path) -> None:
    def varied(name: str, *more: str) -> list[str]:
        sizes = ("run.max_steps=8", "batch.global_batch=16", "model.drop_path=0.3", "run.save_every=3")
        return settings(tmp_path, colours, name, *sizes, "finetune.validate_epochs=0.75", *more)

    assert run_ranks(varied("one", "batch.micro_batch=16"), world_size=1, recipe="finetune") == [0]
    two = varied("two", "batch.micro_batch=4", "zero.stage=3", "finetune.eval_batch=3")
    saved = tmp_path / "two/checkpoints/step_00000003/complete.json"
    run_ranks(two, world_size=2, recipe="finetune", kill_when=saved.exists)
    assert run_ranks(two, world_size=2, recipe="finetune") == [0, 0]
    one, other = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(range(1, 9))
    assert other == pytest.approx(one, rel=1e-5)
    assert events(tmp_path / "two", "resume")[0]["step"] in (3, 6)
    a, b = (read(tmp_path / name / "finetune.json") for name in ("one", "two"))
    assert a["samples"] == {"train": 64, "val": 16, "test": 32}
    assert a["test"]["samples"] == b["test"]["samples"] == 32  # each once, on any number of ranks
    assert a["best_step"] == b["best_step"]
    looks = [
        json.loads(line)["step"] for line in (tmp_path / "one/validation.jsonl").read_text().splitlines()
    ]
    assert looks == [3, 6, 8]


def test_distributions_and_values_are_learned_alike_on_one_rank_and_on_two_after_a_kill(
    tmp_path: Path,
) -> None:
    source = distribution_set(tmp_path / "source", {"train": 32, "val": 8, "test": 8})
    ranges = {"valence": (1.0, 9.0), "arousal": (1.0, 9.0)}
    data = packed(source, tmp_path / "data", layout="table", dimension_ranges=ranges)

    def varied(name: str, *more: str) -> list[str]:
        learns = ("finetune.target=distribution", "finetune.dimensions=[valence, arousal]")
        sizes = ("run.max_steps=8", "batch.global_batch=16", "run.save_every=3", "model.drop_path=0.3")
        return settings(tmp_path, data, name, *learns, *sizes, "finetune.validate_epochs=1.5", *more)

    labelled = settings(
        tmp_path, data, "labels", "run.max_steps=3", "batch.global_batch=16", "batch.micro_batch=16"
    )
    more = [("finetune", [*labelled, "finetune.dimensions=[valence]"])]
    emotion6(tmp_path / "Emotion6")
    recipe_text = (Path(launch.__file__).parent / "recipes/finetune_emotion6_ldl.yaml").read_text()
    pack_line = next(line for line in recipe_text.splitlines() if "shards pack Emotion6" in line)
    words = [
        {"Emotion6": str(tmp_path / "Emotion6"), "DATA": str(tmp_path / "seven")}.get(w, w)
        for w in pack_line.split()
    ]
    assert run(words[2:]) == 0
    short = ("run.max_steps=2", "batch.global_batch=8", "batch.micro_batch=4")
    more.append(("finetune_emotion6_ldl", settings(tmp_path, tmp_path / "seven", "ldl", *short)))
    assert run_ranks(varied("one", "batch.micro_batch=16"), world_size=1, recipe="finetune", more=more) == [0]
    two = varied("two", "batch.micro_batch=4", "zero.stage=2", "finetune.eval_batch=3")
    saved = tmp_path / "two/checkpoints/step_00000003/complete.json"
    run_ranks(two, world_size=2, recipe="finetune", kill_when=saved.exists)
    assert run_ranks(two, world_size=2, recipe="finetune") == [0, 0]
    # A run on one rank that is killed and resumed ends with the same numbers, bit for bit.
    cut = varied("cut", "batch.micro_batch=16")
    first = tmp_path / "cut/checkpoints/step_00000003/complete.json"
    run_ranks(cut, world_size=1, recipe="finetune", kill_when=first.exists)
    assert run_ranks(cut, world_size=1, recipe="finetune") == [0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    line = json.loads((tmp_path / "one/metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["labels"] + line["dimensions"], rel=1e-5)
    one, other, again = (read(tmp_path / name / "finetune.json") for name in ("one", "two", "cut"))
    assert {**again, "run": "one"} == one
    assert (one["task"], one["target"], one["labels"]) == ("single", "distribution", ["awe", "fear", "joy"])
    assert one["dimension_ranges"] == {"valence": [1, 9], "arousal": [1, 9]}
    valence, arousal = one["test"]["dimensions"]
    assert (valence["samples"], arousal["samples"]) == (6, 8)  # unknown for every fourth
    assert arousal["correlation"] is arousal["ccc"] is None  # of a constant
    for name in ("kl_divergence", "chebyshev", "clark", "canberra", "cosine", "intersection", "accuracy"):
        assert one["test"][name] == pytest.approx(other["test"][name], rel=1e-3), name
        low, high = one["test"][f"{name}_interval"]
        assert low <= one["test"][name] <= high, name
    lines = [json.loads(line) for line in (tmp_path / "one/validation.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["kl_divergence"] * 3
    best = min(lines, key=lambda line: line["value"])
    assert one["best_step"] == best["step"]
    assert one["val"]["kl_divergence"] == best["value"]
    facts = read(tmp_path / "one/best/uniemox.json")
    assert (facts["target"], facts["dimension_ranges"]) == ("distribution", one["dimension_ranges"])
    # The released classifier answers with shares, and with values on the scale of the data: as the test measured.
    pictures = sorted(source.glob("test_*.jpg"))
    answers = [
        next(predict(load_classifier_predictor(tmp_path / "one/best"), Pictures(str(path))))
        for path in pictures
    ]
    shares = [[answer["probabilities"][label] for label in one["labels"]] for answer in answers]
    truth = [json.loads(row) for row in (source / "test.jsonl").read_text().splitlines()]
    true = [[row["distribution"][label] for label in one["labels"]] for row in truth]
    scores = metrics.distribution_scores(np.array(shares), np.array(true))
    assert {name: score.mean() for name, score in scores.items()} == pytest.approx(
        {name: one["test"][name] for name in scores}, abs=1e-4
    )
    errors = [abs(answer["dimensions"]["arousal"] - 3) for answer in answers]
    assert np.mean(errors) == pytest.approx(arousal["mean_absolute_error"], abs=1e-3)
    ldl = read(tmp_path / "ldl/finetune.json")
    assert ldl["labels"] == rows(ldl["test"]) == list(load_presets()["emotion6"].distribution_labels)
    assert ldl["dimension_ranges"] == {"valence": [1, 9], "arousal": [1, 9]}
    assert ldl["samples"] == {"train": 42, "val": 6, "test": 12}  # neutral is no label, but a share
    [neutral] = [row for row in ldl["test"]["per_class"] if row["label"] == "neutral"]
    assert (neutral["samples"], neutral["mean_share"]) == (0, pytest.approx(0.266667, abs=1e-5))
    assert run(["report", str(tmp_path / "one")]) == 0
    page = (tmp_path / "one/report.html").read_text()
    assert all(
        text in page
        for text in ("Validation KL divergence", "Intersection<small>higher", "<th>Test</th>", "<th>CCC")
    )
    labelled_result = read(tmp_path / "labels/finetune.json")
    assert labelled_result["target"] == "label"
    assert [row["samples"] for row in labelled_result["test"]["dimensions"]] == [6]
    assert "kl_divergence" not in labelled_result["test"]


def test_colours_are_learned_the_best_weights_kept_and_patience_ends_a_run(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: Sequence[str] = ("finetune.mixup=0", "finetune.cutmix=0", "finetune.rand_augment=null")
    sizes = ("batch.global_batch=16", "batch.micro_batch=16", "optim.layer_decay=1", "optim.blr=0.024")
    learns = settings(tmp_path, colours, "learns", *sizes, *plain, "run.max_steps=60", "finetune.erasing=0")
    still = settings(
        tmp_path, colours, "still", *sizes, "run.max_steps=60", "optim.blr=1e-12", "finetune.patience=2"
    )
    assert run_ranks(
        learns, world_size=1, recipe="finetune", more=[("finetune", still), ("finetune", still)]
    ) == [0]
    found = read(tmp_path / "learns/finetune.json")
    assert found["test"]["accuracy"] >= 0.9
    assert found["test"]["accuracy_interval"][0] > 0.5
    best = read(tmp_path / "learns/best/uniemox.json")
    assert best["metrics"]["val"] == found["val"]
    assert best["step"] == found["best_step"]
    # Nothing is learned at such a rate: the first look is the best, and two more end the run. Again: nothing is left.
    ends = events(tmp_path / "still", "end")
    assert [end["step"] for end in ends] == [12, 12]
    assert "in 2 validations (finetune.patience=2)" in ends[0]["reason"]
    assert read(tmp_path / "still/finetune.json")["best_step"] == 4
    # The first of the two did all the work; differences are reported before anything is written.
    other = [*still, "finetune.mixup=0.5", "run.max_steps=61"]
    assert run_ranks(still, world_size=1, recipe="finetune") == [0]
    assert len((tmp_path / "still/validation.jsonl").read_text().splitlines()) == 3
    with pytest.raises(AssertionError, match=r"finetune\.mixup was 0\.8 and is 0\.5"):
        run_ranks(other, world_size=1, recipe="finetune")


def test_values_are_learned_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    for split, count in (("train", 60), ("test", 15)):
        rows = []
        for i in range(count):
            at = picture(source / f"{split}_{i:03d}.jpg", i % 3, 3, seed=i + 100 * len(split))
            rows.append({"path": at.name, "arousal": 1 + 4 * (i % 3)} if i else {"path": at.name})
        (source / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = packed(source, tmp_path / "data", layout="table", dimension_ranges={"arousal": (1.0, 9.0)})
    learns = (
        "finetune.target=dimensions",
        "finetune.dimensions=[arousal]",
        "run.max_steps=40",
        "zero.stage=1",
    )
    plain = ("finetune.mixup=0", "finetune.cutmix=0", "finetune.rand_augment=null", "finetune.erasing=0")
    sizes = ("batch.global_batch=12", "batch.micro_batch=12", "optim.layer_decay=1", "optim.blr=0.024")
    more = ("finetune.validate_epochs=2", "batch.streams=2")
    assert run_ranks(
        settings(tmp_path, data, "values", *learns, *plain, *sizes, *more), world_size=1, recipe="finetune"
    ) == [0]
    found = read(tmp_path / "values/finetune.json")
    assert (found["labels"], found["target"], found["dimension_ranges"]) == (
        [],
        "dimensions",
        {"arousal": [1, 9]},
    )
    assert found["samples"] == {"train": 53, "val": 6, "test": 14}
    assert (
        f"data.path={data}/test: 1 of 15 pictures have no value of any dimension and are left out"
        in found["remarks"]
    )
    assert found["test"]["mean_ccc"] > 0.8
    assert found["test"]["mean_ccc"] == found["test"]["dimensions"][0]["ccc"]
    lines = [json.loads(line) for line in (tmp_path / "values/validation.jsonl").read_text().splitlines()]
    assert {line["metric"] for line in lines} == {"mean_ccc"}
    assert found["val"]["mean_ccc"] == max(line["value"] for line in lines)
    best = tmp_path / "values/best"
    assert timm.create_model(f"local-dir:{best}", pretrained=True).num_classes == 1
    names = [f"test_{i:03d}.jpg" for i in range(1, 15)]
    answers = [next(predict(load_classifier_predictor(best), Pictures(str(source / name)))) for name in names]
    assert [set(answer) for answer in answers] == [{"picture", "dimensions"}] * 14
    errors = [abs(a["dimensions"]["arousal"] - (1 + 4 * (i % 3))) for i, a in enumerate(answers, start=1)]
    assert np.mean(errors) == pytest.approx(found["test"]["mean_absolute_error"], abs=1e-3)
    capsys.readouterr()
    assert run(["predict", str(best), str(source / names[0]), "--format", "csv"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header == "picture,label,arousal,error"
    assert line.split(",")[:2] == [names[0], ""]
    assert run(["report", str(tmp_path / "values")]) == 0
    page = (tmp_path / "values/report.html").read_text()
    assert "learns arousal" in page
    assert "<th>Label" not in page
    assert "Validation CCC" in page


def test_a_recipe_of_the_other_command_and_a_wrong_encoder_are_refused(
    tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pretrain", "finetune_fi"]) == 2
    assert "is for fine-tuning; use `uniemox finetune`" in capsys.readouterr().err
    assert run(["finetune", "demo"]) == 2
    assert "it is for pretraining" in capsys.readouterr().err
    assert run(["finetune", "finetune_fi", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "finetune:" in shown
    assert "teacher:" not in shown
    wide = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2
    )
    timm.models.save_for_hf(wide, str(tmp_path / "wide"), safe_serialization=True)
    init = settings(
        tmp_path, colours, "never", "run.max_steps=2", "batch.global_batch=16", "batch.micro_batch=4"
    )
    with pytest.raises(AssertionError, match="is of another architecture"):
        run_ranks([*init, f"model.init_from={tmp_path}/wide"], world_size=1, recipe="finetune")
    assert not (tmp_path / "never").exists()


def test_the_commands_in_the_document_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs/finetune.md").read_text(encoding="utf-8")
    pack_line, train_line, read_line = text.partition("```sh\n")[2].partition("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    labels_set(Path("pictures"), {split: dict.fromkeys(COLOURS, 4) for split in ("train", "val", "test")})
    shape = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
    config = config_of({**shape, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2})
    student = Student(config.model, config.loss, 12)
    release(write_checkpoint(Path("pretrained"), student, config, 12), Path("OUT"))
    command, *arguments = pack_line.split()
    assert (command, run(arguments)) == ("uniemox", 0)
    command, subcommand, recipe, *pairs = train_line.split()
    assert (command, subcommand, pairs[-2]) == ("uniemox", "finetune", "--nproc")
    small = [pair for pair in TINY if not pair.startswith("model.")]  # OUT states its architecture
    small += ["run.max_steps=2", "batch.global_batch=8", "batch.micro_batch=4"]
    assert run_ranks([*pairs[:-2], *small], world_size=2, recipe=recipe) == [0, 0]
    assert read(Path(read_line.split()[1]))["test"]["samples"] == 16
    code = text.partition("```python\n")[2].partition("```")[0]
    capsys.readouterr()
    exec(compile(code, "docs/finetune.md", "exec"), {})
    assert capsys.readouterr().out == "4 (3, 32, 32)\n"
    assert run(["predict", "runs/mine/best", "pictures/test/red", "--format", "json"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert sorted(line["probabilities"]) == sorted(COLOURS)
    assert run(["report", "runs/mine"]) == 0
    page = Path("runs/mine/report.html").read_text()
    assert all(text in page for text in ("fine-tuning run", "learns 4 labels", "Validation accuracy"))
    capsys.readouterr()
    assert run(["release", "runs/mine", "elsewhere"]) == 2
    assert "is a fine-tuning run; its best weights are in runs/mine/best" in capsys.readouterr().err
