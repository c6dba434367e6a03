"""A teacher's folder passes only settings on to open_clip that cannot run code, load other files or take all memory."""

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import pytest
from inputs import make_teacher

from uniemox_dist.config.schema import TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.teacher.folder_config import check_model_config
from uniemox_dist.teacher.model import Teacher

MODELS = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))


def test_the_settings_of_all_models_of_open_clip_are_allowed(tmp_path: Path) -> None:
    assert len(MODELS) > 100
    for model in MODELS:
        settings = json.loads(model.read_text())
        path = tmp_path / "open_clip_config.json"
        path.write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3}}))
        assert check_model_config(path, "teacher.name=x") == bool(
            settings["text_cfg"].get("hf_tokenizer_name")
        )


def write_changed(folder: Path, section: str | None, settings: dict[str, Any]) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    (config["model_cfg"] if section is None else config["model_cfg"][section]).update(settings)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("section", "settings", "says"),
    [
        (
            "text_cfg",
            {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
            "text_cfg.tokenizer_kwargs.trust_remote_code=true",
        ),
        (
            "text_cfg",
            {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}},
            "text_cfg.tokenizer_kwargs.bpe_path=",
        ),
        ("text_cfg", {"hf_model_name": "somebody/model"}, 'text_cfg.hf_model_name="somebody/model"'),
        ("text_cfg", {"hf_model_pretrained": True}, "text_cfg.hf_model_pretrained=true"),
        ("vision_cfg", {"timm_model_name": "hf-hub:somebody/model"}, "vision_cfg.timm_model_name="),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/x"}, "vision_cfg.timm_model_name="),
        (
            "vision_cfg",
            {"timm_model_name": "vit", "timm_model_pretrained": True},
            "timm_model_pretrained=true",
        ),
        ("vision_cfg", {"act_kwargs": {"inplace": {}}}, "vision_cfg.act_kwargs.inplace={}"),
        ("vision_cfg", {"width": 1 << 40}, "vision_cfg.width=1099511627776"),
        ("vision_cfg", {"layers": -3}, "vision_cfg.layers"),
        ("vision_cfg", {"image_size": [224] * 9}, "vision_cfg.image_size"),
        ("text_cfg", {"vocab_size": "49408"}, 'text_cfg.vocab_size="49408"'),
        ("text_cfg", {"context_length": True}, "text_cfg.context_length=true"),
        (None, {"init_logit_scale": float("inf")}, "model_cfg.init_logit_scale=Infinity"),
        (None, {"cast_dtype": "x"}, 'model_cfg.cast_dtype="x"'),
        (None, {"output_dict\x1b[2J": 1}, r"model_cfg.output_dict"),
    ],
)
def test_other_settings_are_refused_before_open_clip_sees_them(
    section: str | None, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = make_teacher(tmp_path / "clip")
    (folder / "tokenizer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenizer.Tokenizer", None]}})
    )
    write_changed(folder, section, settings)
    with pytest.raises(UserError) as caught:
        Teacher(TeacherConfig(name=f"local-dir:{folder}"))
    text = str(caught.value)
    assert text.startswith(f"teacher.name=local-dir:{folder}: open_clip_config.json: model_cfg.")
    assert says in text
    assert text.isprintable()
    assert "is not a setting that a teacher's folder may have" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "states no model_cfg"),
        (b"{}", "states no model_cfg"),
        (b'{"model_cfg": 3}', "model_cfg=3 is not a setting"),
        (b'{"model_cfg": {"embed_dim": 32, "vision_cfg": {}}}', "states no model_cfg.text_cfg"),
        (b'{"model_cfg": "' + b"x" * (1 << 20) + b'"}', "has more than 1048576 bytes"),
    ],
)
def test_a_damaged_configuration_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "clip")
    (folder / "open_clip_config.json").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        Teacher(TeacherConfig(name=f"local-dir:{folder}"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"teacher.name=local-dir:{folder}: ")
    assert os.path.isdir(folder)


def make_with_tokenizer(folder: Path, **tokenizer: Any) -> Path:
    """A teacher whose texts a tokenizer of transformers in its folder reads."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = make_teacher(folder)
    write_changed(folder, "text_cfg", {"hf_tokenizer_name": "somebody/tokenizer"})
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "smile": 3}
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    reader.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", **tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_tokenizer_of_transformers_is_read_from_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    teacher = Teacher(TeacherConfig(name=f"local-dir:{make_with_tokenizer(tmp_path / 'clip')}"))
    assert teacher.tokenizer(["a smile"]).tolist() == [[2, 3, *[0] * 30]]


def test_python_files_of_a_tokenizer_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word about them transformers asks at the terminal, and runs them if the user says yes."""
    pytest.importorskip("transformers")
    folder = make_with_tokenizer(
        tmp_path / "clip", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}
    )
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: .* contains custom code"):
        Teacher(TeacherConfig(name=f"local-dir:{folder}"))
    assert not (tmp_path / "ran").exists()
