"""`uniemox release`: the files it writes, the step and number format it selects, and its checks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import config_of, write_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

from uniemox_dist import UserError, load_encoder, load_pretrained, load_uniemox
from uniemox_dist.cli.main import run as command
from uniemox_dist.core.files import sha256_file
from uniemox_dist.models.student import Student
from uniemox_dist.release.export import release
from uniemox_dist.release.format import list_altered
from uniemox_dist.runs.folder import RunFolder, append_line

E = 12
SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
STEPS = (100, 200, 300)


def student_of_seed(seed: int) -> Student:
    config = config_of({**SHAPE, **DECODER})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student(config.model, config.loss, E).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints; the loss was lowest before the second, and what came after a restart counts."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = config_of({**SHAPE, **DECODER})
    config = config.model_copy(update={"run": config.run.model_copy(update={"save_every": 100})})
    for step in STEPS:
        write_checkpoint(folder, student_of_seed(step), config, E, step=step)
    losses = {100: 3.0, 200: 1.0, 300: 2.0}
    for first, last in ((10, 310), (210, 310)):  # steps from 200 on were repeated
        for step in range(first, last, 10):
            loss = 0.1 if first == 10 and step > 200 else losses[-(-step // 100) * 100]
            line = {"step": step, "loss": loss, "reconstruction": loss / 2, "lr": 1e-3, "time": float(step)}
            append_line(RunFolder(folder).metrics, line)
    return folder


def released(run: Path, out: Path, *options: str) -> Path:
    assert command(["release", str(run), str(out), *options]) == 0
    return out


def test_a_release_describes_itself_and_contains_no_code(run: Path, tmp_path: Path) -> None:
    evaluation = {
        "format": "uniemox-evaluation",
        "format_version": 1,
        "step": 300,
        "data": {"test": {"identity": "a" * 64}},
        "metrics": [
            {"title": "Linear probe", "better": "higher", "note": "accuracy", "rows": [
                {"row": "student", "value": 0.5, "low": 0.4, "high": 0.6}]}
        ],
        "verdict": ["Better than nothing."],
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    given = ("--evaluation", str(tmp_path / "evaluation.json"), "--licence", "cc-by-4.0")
    out = released(run, tmp_path / "out", *given)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("README.md", "SHA256SUMS", "config.json", "model.safetensors", "training_curves.png"),
        *("uniemox.json", "uniemox.safetensors"),
    }
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: sha256_file(out / name) for name in names - {"SHA256SUMS"}}
    facts = json.loads((out / "uniemox.json").read_text())
    assert (facts["format"], facts["format_version"], facts["step"]) == ("uniemox-release", 1, 300)
    assert (facts["dtype"], facts["feature"], facts["feature_width"]) == ("fp32", "class token", 32)
    assert facts["losses"]["loss"] == 2.0
    student = student_of_seed(300)
    assert facts["parameters"] == sum(p.numel() for p in student.encoder.parameters())
    assert facts["parameters"] + facts["other_parameters"] == sum(p.numel() for p in student.parameters())
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: cc-by-4.0\n" in front
    assert "library_name: timm\n" in front
    assert "| student | 0.5000 | 0.4000 to 0.6000 |" in card
    assert "uniemox evaluate protocol PATH DATA" in card
    with Image.open(out / "training_curves.png") as picture:
        assert picture.width > 300
    model = load_pretrained(out, verify=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), student.parameters()))


@pytest.mark.parametrize(("step", "expected"), [("best", 200), ("100", 100), ("last", 300)])
def test_the_step_can_be_chosen(run: Path, tmp_path: Path, step: str, expected: int) -> None:
    assert release(run, tmp_path / "out", step=step)["step"] == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "150"], "--step=150: RUN="),
        (["--step", "worst"], "it has 100, 200, 300 (or give last or best)"),
        (["--ema"], "holds no moving average"),
        (
            ["--evaluation", "nowhere.json"],
            "--evaluation=nowhere.json: no such file; write it with `uniemox evaluate",
        ),
    ],
)
def test_a_missing_file_is_a_one_line_error(
    run: Path, tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["release", str(run), str(tmp_path / "out"), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not list(tmp_path.iterdir())


def test_without_metrics_no_step_is_the_best(tmp_path: Path) -> None:
    config = config_of({**SHAPE, **DECODER})
    write_checkpoint(tmp_path / "run", student_of_seed(0), config, E)
    with pytest.raises(UserError, match="has no finite losses"):
        release(tmp_path / "run", tmp_path / "out", step="best")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint"):
        release(tmp_path / "nothing", tmp_path / "out")


def test_weights_come_in_the_format_that_was_asked_for(run: Path, tmp_path: Path) -> None:
    out = released(run, tmp_path / "out", "--dtype", "bf16")
    student = student_of_seed(300)
    written = load_file(out / "model.safetensors")
    for name, tensor in student.encoder.state_dict().items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], tensor.bfloat16())
    encoder, _ = load_encoder(out)
    assert next(encoder.parameters()).dtype == torch.float32
    assert (out / "model.safetensors").stat().st_size < 0.6 * 4 * sum(t.numel() for t in written.values())


def test_weights_beyond_a_format_are_refused(tmp_path: Path) -> None:
    student = student_of_seed(0)
    with torch.no_grad():
        student.encoder.norm.weight[0] = 1e6
    write_checkpoint(tmp_path / "run", student, config_of({**SHAPE, **DECODER}), E)
    with pytest.raises(UserError, match=r"encoder\.norm\.weight has values up to 1e\+06, too large for"):
        release(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    release(tmp_path / "run", tmp_path / "out", dtype="bf16")


def test_inspect_describes_a_release_and_verify_finds_one_altered_byte(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = released(run, tmp_path / "out")
    assert command(["release", "--verify", str(out)]) == 0
    assert command(["release", "--inspect", str(out)]) == 0
    told = capsys.readouterr().out
    assert "all files are as SHA256SUMS says" in told
    assert "step 300 (" in told
    data = bytearray((out / "uniemox.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "uniemox.safetensors").write_bytes(data)
    assert command(["release", "--verify", str(out)]) == 2
    assert (
        capsys.readouterr().err.count("uniemox.safetensors was altered (SHA-256 differs from SHA256SUMS)")
        == 1
    )
    with pytest.raises(UserError, match="was altered"):
        load_uniemox(out, verify=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"lacks uniemox\.json"):
        load_encoder(empty)


def test_an_unknown_architecture_and_other_weights_are_one_line_errors(run: Path, tmp_path: Path) -> None:
    out = released(run, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architecture": "vit_of_tomorrow"}))
    with pytest.raises(UserError, match=r"cannot build what config.json names .*vit_of_tomorrow"):
        load_encoder(out)
    weights = load_file(out / "model.safetensors")
    save_file({**weights, "norm.weight": torch.ones(7)}, out / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights do not fit its settings: .*norm.weight"):
        load_pretrained(out)


def sealed(out: Path) -> None:
    """SHA256SUMS of the present files."""
    names = sorted(path.name for path in out.iterdir() if path.name != "SHA256SUMS")
    (out / "SHA256SUMS").write_text("".join(f"{sha256_file(out / name)}  {name}\n" for name in names))


def edited(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_any_altered_byte_of_the_checksums_is_reported(run: Path, tmp_path: Path, bit: int) -> None:
    out = released(run, tmp_path / "out")
    sums = (out / "SHA256SUMS").read_bytes()
    for position in range(len(sums)):
        damaged = bytearray(sums)
        damaged[position] ^= bit
        (out / "SHA256SUMS").write_bytes(damaged)
        _, problem = next(list_altered(out))
        assert next(list_altered(out))[0] == "SHA256SUMS" or "SHA256SUMS" in problem, position
    whole = sums.decode().splitlines(keepends=True)
    for line in whole:
        (out / "SHA256SUMS").write_text("".join(other for other in whole if other != line))
        name = line.split()[1]
        read_by_programs = name.endswith((".safetensors", ".json"))
        assert list(list_altered(out)) == (
            [("SHA256SUMS", f"does not name {name}")] if read_by_programs else []
        )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: (out / "model.safetensors").write_bytes(b"short"), "model.safetensors cannot be read ("),
        (lambda out: (out / "uniemox.safetensors").write_bytes(b"short"), "uniemox.safetensors cannot be read ("),
        (lambda out: (out / "config.json").write_text("{"), "cannot build what config.json names ("),
        (lambda out: edited(out / "config.json", architecture="vit_of_tomorrow"), "vit_of_tomorrow"),
        (lambda out: edited(out / "config.json", model_args={}), "cannot build what config.json names ("),
        (lambda out: edited(out / "uniemox.json", config={}), "uniemox.json: config: "),
    ],
)  # fmt: skip
def test_verify_finds_problems_that_checksums_do_not_show(
    run: Path, tmp_path: Path, damage: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = released(run, tmp_path / "out")
    damage(out)
    sealed(out)
    capsys.readouterr()
    assert command(["release", "--verify", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert says in lines[0]


def test_invalid_pictures_and_devices_are_one_line_errors(run: Path, tmp_path: Path) -> None:
    out = released(run, tmp_path / "out")
    model = load_uniemox(out)
    for wrong in ([], torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "photo.jpg"):
        with pytest.raises(UserError, match=r"^scene: "):
            model.encode(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not a box"):
        model.embed(Image.new("RGB", (9, 9)), [(0.1, 0.2)])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"^device=nowhere: cannot be used"):
        load_uniemox(out, device="nowhere")


def test_pictures_go_into_the_teachers_space_with_and_without_persons(run: Path, tmp_path: Path) -> None:
    out = released(run, tmp_path / "out")
    model, student = load_uniemox(out), load_pretrained(out)
    torch.manual_seed(1)
    pictures = [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), dtype=torch.uint8).numpy())
        for h, w in ((40, 64), (64, 40))
    ]
    scenes, persons = model.views(pictures, None)
    features, fused = student.embed(scenes, persons)
    assert fused is not None
    torch.testing.assert_close(model.encode(pictures), features)
    torch.testing.assert_close(model.embed(pictures), torch.nn.functional.normalize(fused, dim=-1))
    torch.testing.assert_close(model.embed(pictures).norm(dim=-1), torch.ones(2))
    box = (0.25, 0.25, 0.5, 0.75)
    _, crops = model.views(pictures, [box, None])
    assert torch.equal(crops[1], scenes[1])
    assert not torch.equal(crops[0], scenes[0])
    one = model.embed(pictures[0], [box])
    torch.testing.assert_close(one, model.embed(pictures, [box, None])[:1])
    assert not torch.allclose(one, model.embed(pictures[0]))
    stacked = torch.stack([scenes[0], scenes[1]])
    torch.testing.assert_close(model.embed(stacked), model.embed(pictures))
    for wrong in ([(0.5, 0.0, 0.2, 1.0), None], [None]):
        with pytest.raises(UserError, match=r"^persons: "):
            model.embed(pictures, wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="give pictures, or uint8"):
        model.embed(torch.zeros(2, 3, 32, 32))


def test_a_release_without_a_teacher_has_features_and_no_space(tmp_path: Path) -> None:
    config = config_of({**SHAPE, **DECODER}, relation=0.0, similarity=0.0)
    student = Student(config.model, config.loss, None).eval()
    write_checkpoint(tmp_path / "run", student, config, None)
    release(tmp_path / "run", tmp_path / "out")
    model = load_uniemox(tmp_path / "out")
    picture = Image.new("RGB", (50, 30), "teal")
    assert model.encode(picture).shape == (1, 32)
    with pytest.raises(UserError, match="trained without a teacher"):
        model.embed(picture)


def test_onnx_agrees_with_torch(run: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = released(run, tmp_path / "out", "--onnx")
    facts: dict[str, Any] = json.loads((out / "uniemox.json").read_text())["onnx"]
    assert facts["differs_by"] < 1e-3
    session = onnxruntime.InferenceSession(str(out / "encoder.onnx"), providers=["CPUExecutionProvider"])
    encoder, preprocess = load_encoder(out, verify=True)
    pixels = torch.stack(
        [preprocess(Image.new("RGB", (60, 40), colour)) for colour in ("red", "blue", "teal")]
    )
    with torch.no_grad():
        expected = encoder(pixels)
    found = torch.from_numpy(session.run(["features"], {"pixels": pixels.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
