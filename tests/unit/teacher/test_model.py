"""The teacher uses its own pixel statistics and size, is frozen, and rejects unsuitable files."""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from inputs import make_teacher
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_file
from uniemox_dist.teacher.identity import TeacherFacts, read_stated_facts
from uniemox_dist.teacher.model import Teacher

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An open_clip model name of our own: a CLIP as small as `tiny_teacher`, with QuickGELU."""
    config = json.loads(
        (make_teacher(tmp_path_factory.mktemp("small") / "clip") / "open_clip_config.json").read_text()
    )
    path = tmp_path_factory.mktemp("models") / "tiny-quickgelu.json"
    path.write_text(json.dumps({**config["model_cfg"], "quick_gelu": True}))
    open_clip.add_model_config(path)
    return "tiny-quickgelu"


@pytest.fixture(scope="module")
def openais(small_clip: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript archive like OpenAI's: a traced CLIP in half precision, with three numbers among its tensors."""
    model: Any = open_clip.create_model(small_clip).eval()
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(32))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 32, dtype=torch.long)}
    path = tmp_path_factory.mktemp("openai") / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, inputs, check_trace=False)
    traced.half().save(str(path))
    return path


def changed(teacher: Path, tmp_path: Path, **sections: Any) -> Path:
    """A copy of a teacher with other sections in its configuration."""
    folder = tmp_path / "changed"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**config, **sections}))
    return folder


def test_pictures_are_normalised_with_the_teachers_statistics_and_resized_to_its_size(
    teacher: Teacher, tiny_teacher: Path
) -> None:
    assert (teacher.size, teacher.width) == (32, 32)
    pixels = torch.randint(
        0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    small = F.interpolate((pixels / 255 - mean) / std, (32, 32), mode="bicubic", antialias=True)
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    with torch.no_grad():
        expected = model.encode_image(small, normalize=True)
    torch.testing.assert_close(teacher.embed_pictures(pixels), expected, rtol=1e-5, atol=1e-5)


def test_texts_are_unit_rows_of_the_same_space(teacher: Teacher, tiny_teacher: Path) -> None:
    found = teacher.embed_texts(["a cat", ""])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    with torch.no_grad():
        expected = model.encode_text(
            open_clip.get_tokenizer(f"local-dir:{tiny_teacher}")(["a cat", ""]), normalize=True
        )
    torch.testing.assert_close(found, expected)


def test_the_teacher_is_frozen_and_gives_no_gradient(teacher: Teacher) -> None:
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert not teacher.embed_pictures(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad


def test_without_its_text_tower_pictures_are_the_same(tiny_teacher: Path) -> None:
    teacher = Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    pixels = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    before = teacher.embed_pictures(pixels)
    total = sum(p.numel() for p in teacher.model.parameters())
    teacher.drop_text_tower()
    assert torch.equal(teacher.embed_pictures(pixels), before)
    assert sum(p.numel() for p in teacher.model.parameters()) < total / 2


@pytest.mark.parametrize("name", ["local-dir:/nowhere", "shipped:other"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"teacher.name={name}"):
        Teacher(TeacherConfig(name=name))


def test_an_unknown_open_clip_name_gets_the_nearest_ones(tiny_teacher: Path) -> None:
    weights = str(tiny_teacher / "open_clip_model.safetensors")
    config = TeacherConfig(name="ViT-B-16-quikgelu", weights=weights, mean=HALF, std=HALF)
    with pytest.raises(UserError, match="not an open_clip model; did you mean ViT-B-16-quickgelu or"):
        Teacher(config)


@pytest.mark.parametrize(
    ("preprocess", "says"),
    [
        ({"mean": [0.5, 0.5, 0.5]}, "does not state std; add it"),
        (
            {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0, 0.5]},
            r"std is \[0.5, 0, 0.5\]; give three positive numbers",
        ),
        ({"mean": 0.5, "std": [0.5, 0.5, 0.5]}, "mean is 0.5; give three numbers"),
    ],
)
def test_pixel_statistics_must_be_stated_and_possible(
    tiny_teacher: Path, tmp_path: Path, preprocess: dict[str, Any], says: str
) -> None:
    folder = changed(tiny_teacher, tmp_path, preprocess_cfg=preprocess)
    with pytest.raises(UserError, match=f"preprocess_cfg in open_clip_config.json:? {says}"):
        Teacher(TeacherConfig(name=f"local-dir:{folder}"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_the_tensors_name(
    tiny_teacher: Path, tmp_path: Path, value: float
) -> None:
    shutil.copytree(tiny_teacher, tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.ln_post.weight"][3:5] = value
    save_file(weights, path)
    says = f"teacher.name=local-dir:{tmp_path}/clip: tensor visual.ln_post.weight holds 2 numbers that are NaN or inf"
    with pytest.raises(UserError, match=says):
        Teacher(TeacherConfig(name=f"local-dir:{tmp_path / 'clip'}"))


def test_towers_without_a_common_width_are_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "none", embed=0)
    with pytest.raises(UserError, match="embeds pictures in 0 numbers and texts in 32; use a CLIP"):
        Teacher(TeacherConfig(name=f"local-dir:{folder}"))
    # A separate text tower, without a projection to the pictures' width.
    config = json.loads((make_teacher(tmp_path / "two") / "open_clip_config.json").read_text())
    model_cfg = {**config["model_cfg"], "custom_text": True, "embed_dim": 48}
    model_cfg["text_cfg"]["proj_type"] = "none"
    config["model_cfg"] = model_cfg
    (tmp_path / "two" / "open_clip_config.json").write_text(json.dumps(config))
    towers = {key: value for key, value in model_cfg.items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**towers)
    save_file(model.state_dict(), tmp_path / "two" / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="embeds pictures in 48 numbers and texts in 32; use a CLIP"):
        Teacher(TeacherConfig(name=f"local-dir:{tmp_path / 'two'}"))


def test_a_torchscript_archive_is_the_same_teacher_and_none_of_its_code_is_run(
    openais: Path, tmp_path: Path, small_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", None)
    teacher = Teacher(TeacherConfig(name=small_clip, weights=str(openais), mean=HALF, std=HALF))
    assert teacher.identity["weights_sha256"] == sha256_file(openais)
    assert teacher.identity["activation"] == "QuickGELU"
    plain = tmp_path / "plain.safetensors"
    save_file(
        {name: t for name, t in teacher.model.state_dict().items() if t.numel()},
        plain,
    )
    same = Teacher(TeacherConfig(name=small_clip, weights=str(plain), mean=HALF, std=HALF))
    pixels = torch.arange(3 * 32 * 32, dtype=torch.int64).remainder(251).byte().view(1, 3, 32, 32)
    assert torch.equal(teacher.embed_pictures(pixels), same.embed_pictures(pixels))
    assert torch.equal(teacher.embed_texts(["a cat"]), same.embed_texts(["a cat"]))
    assert teacher.identity["weights_sha256"] != same.identity["weights_sha256"]


def test_openais_archive_with_the_wrong_activation_is_refused(openais: Path) -> None:
    config = TeacherConfig(name="ViT-B-32", weights=str(openais), mean=HALF, std=HALF)
    with pytest.raises(UserError, match="OpenAI's weights need QuickGELU; use ViT-B-32-quickgelu"):
        Teacher(config)


class Bomb:
    """Pickles to code that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("form", ["torch.save", "pickle", "TorchScript"])
def test_pickled_code_in_a_file_of_weights_is_refused_and_never_run(
    form: str, tmp_path: Path, openais: Path, small_clip: str
) -> None:
    path, traces = tmp_path / "weights.pt", tmp_path / "was_here"
    bomb = {"logit_scale": torch.ones(()), "more": Bomb(traces)}
    if form == "torch.save":
        torch.save(bomb, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        with zipfile.ZipFile(openais) as archive, zipfile.ZipFile(path, "w") as out:
            for name in archive.namelist():
                data = pickle.dumps(bomb, 2) if name.endswith("/data.pkl") else archive.read(name)
                out.writestr(name, data)
    with pytest.raises(UserError) as error:
        Teacher(TeacherConfig(name=small_clip, weights=str(path), mean=HALF, std=HALF))
    text = str(error.value)
    assert text.startswith(f"teacher.weights={path}: ")
    assert len(text.splitlines()) == 1
    assert len(text) < 300
    assert "pickled code, which is never run" in text
    assert form == "pickle" or "exec)" in text
    assert not traces.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_or_other_archive_is_a_one_line_error(
    damage: str, tmp_path: Path, openais: Path, small_clip: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(openais.read_bytes()[:5000] if damage == "cut" else b"no weights at all")
    if damage == "other":
        script: Any = torch.jit.script(torch.nn.Linear(2, 2))
        script.save(str(path))
    with pytest.raises(UserError, match=f"teacher.weights={path}: .*") as error:
        Teacher(TeacherConfig(name=small_clip, weights=str(path), mean=HALF, std=HALF))
    assert len(str(error.value).splitlines()) == 1


def test_a_compiled_picture_tower_is_one_graph_beside_its_pixels_with_the_same_embeddings(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def keep(graph: Any, *_: Any, **__: Any) -> Any:  # building C++ of it would take half a minute
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep)
    plain = Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    compiled = Teacher(TeacherConfig(name=f"local-dir:{tiny_teacher}", compile=True))
    pixels = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    expected = plain.embed_pictures(pixels)
    assert not graphs  # the first call compiles
    torch.testing.assert_close(compiled.embed_pictures(pixels), expected, rtol=0, atol=1e-6)
    assert len(graphs) == 2  # the preparation of the pixels, and the tower
    compiled.drop_text_tower()
    torch.testing.assert_close(compiled.embed_pictures(pixels), expected, rtol=0, atol=1e-6)
    assert len(graphs) == 2


def test_facts_survive_json_and_others_are_refused(teacher: Teacher, tiny_teacher: Path) -> None:
    facts = teacher.facts
    again = TeacherFacts.from_json(json.loads(json.dumps(facts.to_json())))
    assert again == facts
    assert (again.id, again.width) == (teacher.id, 32)
    assert again.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert again.identity["mean"] == [0.5, 0.4, 0.3]
    record = facts.to_json()
    for broken in (None, [], {}, {**record, "width": 0}, {**record, "logit_scale": float("nan")}):
        with pytest.raises(ValueError):
            TeacherFacts.from_json(broken)
    stated = read_stated_facts(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    assert stated == {key: facts.identity[key] for key in ("weights_sha256", "mean", "std")}
    assert read_stated_facts(TeacherConfig(name="local-dir:/gone")) == {"name": "local-dir:/gone"}


def test_the_shipped_teacher_loads_offline_and_distinguishes_a_heart_from_a_house(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import pyarrow.parquet as pq

    from uniemox_dist.data.views import decode_tensor, resize_whole

    teacher = Teacher(TeacherConfig(name="shipped:demo"))
    assert (teacher.size, teacher.width, teacher.mean) == (80, 128, (0.5, 0.5, 0.5))
    table = pq.read_table(Path(__file__).parents[3] / "shards/demo/fluent_emoji.parquet")
    rows = [
        r
        for r in table.to_pylist()
        if r["caption"].split(":")[0] in ("red heart", "house", "dog face", "pizza")
    ]
    assert len(rows) == 4
    pictures = teacher.embed_pictures(
        torch.stack([resize_whole(decode_tensor(r["image"]), 80) for r in rows])
    )
    similarity = pictures @ teacher.embed_texts([r["caption"] for r in rows]).T
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
