"""Initial weights from other models, releases and runs compute the same function in the student."""

import json
from pathlib import Path
from typing import Any

import mae
import pytest
import timm
import torch
from handmade import config_of, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from uniemox_dist.config.schema import LossConfig, ModelConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.init_from import load_initial_weights
from uniemox_dist.models.patches import patchify, sincos_positions
from uniemox_dist.models.student import Student
from uniemox_dist.release.export import release

SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 4}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}
MODEL: dict[str, Any] = {**SHAPE, **DECODER}
B, E = 3, 12


def student(seed: int = 0, *, width: int | None = E, **model: Any) -> Student:
    torch.manual_seed(seed)
    loss = LossConfig() if width else LossConfig(relation=0, similarity=0)
    return Student(ModelConfig(**{**MODEL, **model}), loss, width).eval()


def stirred(made: Student) -> Student:
    """Every weight made to count."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


def weights_of(made: Student) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.named_parameters()}


@torch.no_grad()
def test_weights_in_maes_layout_give_the_outputs_of_maes_model(tmp_path: Path) -> None:
    shape = mae.Shape()
    state = mae.save(tmp_path / "mae.pth", shape)
    made = student()
    loaded = load_initial_weights(made, tmp_path / "mae.pth")
    pixels = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8)
    order = torch.stack([torch.randperm(16) for _ in range(B)])
    keep, masked = made.split(order)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (made.model.mean, made.model.std))
    tokens = mae.encode(state, shape, (pixels / 255 - mean) / std, keep)
    found = made.encoder(made.patches(pixels), keep)
    torch.testing.assert_close(found, tokens, rtol=1e-5, atol=1e-5)
    # Patches to pictures as MAE does it, and from those to patches as ours are.
    predicted = patchify(mae.unpatchify(mae.decode(state, shape, tokens, keep), shape), 8)
    expected = torch.stack([sample[rows] for sample, rows in zip(predicted, masked)])
    assert made.decoder is not None
    torch.testing.assert_close(
        made.decoder(made.to_decoder(found), keep, masked), expected, rtol=1e-5, atol=1e-5
    )
    assert {name.partition(".")[0] for name in loaded.missing} == {"fusion"}
    assert loaded.unexpected == ()
    assert loaded.resampled == {}
    assert loaded.layout == "MAE's names"


def test_the_report_lists_loaded_and_missing_parameters(tmp_path: Path) -> None:
    mae.save(tmp_path / "mae.pth", mae.Shape(), decoder=False)
    loaded = load_initial_weights(student(), tmp_path / "mae.pth")
    assert loaded.describe().splitlines() == [
        f"initial weights from {tmp_path}/mae.pth (timm's names): 30 of 67 parameters; resampled: nothing; its learned "
        "positions stay fixed (model.positions=fixed)",
        "missing: to_decoder.weight, to_decoder.bias, fusion (5), decoder (30); not used: nothing",
    ]
    mae.save(tmp_path / "mae.pth", mae.Shape(side=3))
    loaded = load_initial_weights(
        student(positions="learned", width=None, patch_size=4, image_size=40), tmp_path / "mae.pth"
    )
    assert loaded.describe().splitlines() == [
        f"initial weights from {tmp_path}/mae.pth (MAE's names): 60 of 62 parameters; resampled: "
        "encoder.patch_embed.proj.weight 8x8 -> 4x4, encoder.pos_embed 3x3 -> 10x10, decoder.pos_embed 3x3 -> 10x10",
        "missing: decoder.prediction.weight, decoder.prediction.bias; not used: decoder.prediction.weight, "
        "decoder.prediction.bias",
    ]


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module.", "ours", "safetensors", "half"])
def test_wrappers_prefixes_and_formats_are_seen_through(tmp_path: Path, wrapped: str) -> None:
    original = stirred(student())
    state: dict[str, Any] = {k: v.clone() for k, v in original.encoder.state_dict().items()}
    state["head.weight"], state["fc_norm.weight"] = torch.zeros(10, 32), torch.ones(32)
    path = tmp_path / ("vit.safetensors" if wrapped == "safetensors" else "vit.bin")
    unexpected: tuple[str, ...] = ("encoder.fc_norm.weight",)
    tolerance = 0.0
    if wrapped == "safetensors":
        save_file(state, path)
    else:
        if wrapped == "module.":
            state = {f"module.{k}": v for k, v in state.items()}
        if wrapped == "ours":
            state, unexpected = dict(original.state_dict()), ()
        if wrapped == "half":
            state, tolerance = {k: v.half() for k, v in state.items()}, 1e-3
        torch.save({"epoch": 3, "state_dict": state} if wrapped == "state_dict" else state, path)
    made = student(1)
    loaded = load_initial_weights(made, path)
    assert loaded.unexpected == unexpected
    parts = (
        set(weights_of(made))
        if wrapped == "ours"
        else {n for n in weights_of(made) if n.startswith("encoder.")}
    )
    assert set(loaded.loaded) == parts
    for name in parts:
        torch.testing.assert_close(
            weights_of(made)[name], weights_of(original)[name], rtol=tolerance, atol=tolerance
        )


def test_a_timm_folder_a_release_a_run_and_its_checkpoint_give_the_same_encoder(tmp_path: Path) -> None:
    original = stirred(student())
    config = config_of(MODEL)
    write_checkpoint(tmp_path / "run", original, config, E)
    release(tmp_path / "run", tmp_path / "release")
    vit: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    )
    vit.load_state_dict(original.encoder.state_dict(), strict=False)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    timm.models.save_for_hf(vit, str(tmp_path / "timm"), model_args=arguments, safe_serialization=True)
    for source, everything in (
        ("run", True),
        ("run/checkpoints/step_00000007", True),
        ("release", True),
        ("timm", False),
        ("release/model.safetensors", False),
    ):
        made = student(1)
        loaded = load_initial_weights(made, tmp_path / source)
        assert loaded.unexpected == ()
        taken = set(loaded.loaded)
        assert taken == {n for n in weights_of(original) if everything or n.startswith("encoder.")}, source
        assert all(torch.equal(weights_of(made)[n], weights_of(original)[n]) for n in taken), source


def test_a_part_that_does_not_fit_is_left_out_as_a_whole(tmp_path: Path) -> None:
    original = stirred(student())
    write_checkpoint(tmp_path / "run", original, config_of(MODEL), E)
    made = student(1, decoder_depth=1, fusion="attention", fusion_heads=2)
    before = weights_of(made)
    loaded = load_initial_weights(made, tmp_path / "run")
    taken = {name.partition(".")[0] for name in loaded.loaded if not name.startswith("decoder.prediction.")}
    assert taken == {"encoder", "to_decoder"}
    assert "decoder.prediction.weight" in loaded.loaded
    for name in loaded.missing:
        assert torch.equal(weights_of(made)[name], before[name])
    assert "decoder.blocks.1.norm1.weight" in loaded.unexpected
    assert "fusion.norm.weight" in loaded.unexpected


def test_a_checkpoint_of_an_earlier_version_leaves_the_fixed_positions_as_they_are(tmp_path: Path) -> None:
    original = stirred(student())
    write_checkpoint(tmp_path / "run", original, config_of(MODEL), E, fixed=False)
    made = student(1)
    loaded = load_initial_weights(made, tmp_path / "run")
    assert set(loaded.missing) == {"encoder.pos_embed", "decoder.pos_embed"}
    assert torch.equal(made.encoder.pos_embed, torch.nn.Parameter(sincos_positions(32, 4)))  # type: ignore[arg-type]


@torch.no_grad()
def test_other_picture_and_patch_sizes_are_resampled_as_timm_does(tmp_path: Path) -> None:
    state = mae.save(tmp_path / "mae.pth", mae.Shape(), decoder=False)
    made = student(image_size=48, patch_size=12)
    assert load_initial_weights(made, tmp_path / "mae.pth").resampled == {
        "encoder.patch_embed.proj.weight": "8x8 -> 12x12"
    }
    made = student(image_size=48, patch_size=4)
    load_initial_weights(made, tmp_path / "mae.pth")
    reference: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    )
    reference.load_state_dict(state)
    reference.set_input_size(img_size=(48, 48), patch_size=(4, 4))
    pixels = torch.randn(B, 3, 48, 48)
    everything = torch.arange(144).expand(B, -1)
    found = made.encoder(patchify(pixels, 4), everything)
    torch.testing.assert_close(found, reference.forward_features(pixels), rtol=1e-5, atol=1e-5)


def vit(**changes: Any) -> Any:
    torch.manual_seed(3)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    made: Any = timm.create_model("vit_tiny_patch16_224", **{**shape, **changes}).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


@torch.no_grad()
def test_the_class_tokens_position_is_added_to_the_token_without_a_row_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uniemox_dist.models import encoder as encoders

    plain = encoders.encoder_arguments
    everything = torch.arange(16).expand(B, -1)
    pixels = torch.randn(B, 3, 32, 32)
    for theirs, ours in (
        ({}, {"no_embed_class": True}),
        ({"no_embed_class": True}, {}),
        ({"reg_tokens": 2}, {"reg_tokens": 2, "no_embed_class": True}),
        ({"reg_tokens": 2, "no_embed_class": True}, {"reg_tokens": 2}),
        ({"reg_tokens": 2}, {"reg_tokens": 2}),
    ):
        there = vit(**theirs)
        save_file(there.state_dict(), tmp_path / "vit.safetensors")
        monkeypatch.setattr(encoders, "encoder_arguments", lambda model, ours=ours: {**plain(model), **ours})
        made = student(1)
        loaded = load_initial_weights(made, tmp_path / "vit.safetensors")
        assert not [name for name in loaded.missing if name.startswith("encoder.")], (theirs, ours)
        tokens = there.forward_features(pixels)
        expected = torch.cat([tokens[:, :1], tokens[:, there.num_prefix_tokens :]], dim=1)
        found = made.encoder(patchify(pixels, 8), everything)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_position_rows_that_the_student_lacks_are_separated_from_those_of_patches(tmp_path: Path) -> None:
    # Registers without rows beside a class token with one, as in the original DINOv2 files; and DeiT's second token.
    for token, extra in (("reg_token", torch.ones(1, 4, 32)), ("dist_token", torch.ones(1, 1, 32))):
        state = dict(vit().state_dict())
        table = state["pos_embed"]
        rows = table if token == "reg_token" else torch.cat([table[:, :1], 9 * extra, table[:, 1:]], dim=1)
        save_file({**state, "pos_embed": rows.contiguous(), token: extra}, tmp_path / "vit.safetensors")
        made = student(1)
        loaded = load_initial_weights(made, tmp_path / "vit.safetensors")
        assert loaded.unexpected == (f"encoder.{token}",)
        assert torch.equal(made.encoder.pos_embed, torch.nn.Parameter(table, requires_grad=False))  # type: ignore[arg-type]


def test_learned_positions_stay_fixed_unless_they_are_to_be_learned(tmp_path: Path) -> None:
    mae.save(tmp_path / "learned.pth", mae.Shape())
    for positions, says in (("fixed", True), ("learned", False)):
        made = student(positions=positions)
        loaded = load_initial_weights(made, tmp_path / "learned.pth")
        assert loaded.kept_positions is says
        assert made.encoder.pos_embed is not None
        assert made.encoder.pos_embed.requires_grad is (positions == "learned")
    save_file(dict(student().encoder.state_dict()), tmp_path / "sincos.safetensors")
    assert not load_initial_weights(student(), tmp_path / "sincos.safetensors").kept_positions


def test_every_error_leaves_the_student_unchanged_and_names_the_fix(tmp_path: Path) -> None:
    state = dict(vit().state_dict())
    nan = {**state, "blocks.1.mlp.fc2.bias": torch.full((32,), torch.inf)}
    shallow = {k: v for k, v in state.items() if not k.startswith("blocks.1.")}
    deep = {
        **state,
        **{k.replace("blocks.1.", "blocks.2."): v.clone() for k, v in state.items() if "blocks.1." in k},
    }
    scaled = {**state, "blocks.0.ls1.gamma": torch.ones(32)}
    uneven = {**state, "pos_embed": torch.zeros(1, 8, 32)}
    several = {**{f"a.{k}": v for k, v in state.items()}, **{f"b.{k}": v.clone() for k, v in state.items()}}
    blocks = {k: v for k, v in state.items() if "patch_embed" not in k}
    for name, content, says in (
        ("nan", nan, r"encoder.blocks.1.mlp.fc2.bias has weights that are NaN or infinite"),
        (
            "shallow",
            shallow,
            r"encoder.blocks.1.attn.qkv.weight is here and not there; it has width 32 and depth 1",
        ),
        ("deep", deep, r"encoder.blocks.2.\S+ is there and not here; .* depth 3, set model.width/depth$"),
        ("scaled", scaled, r"encoder.blocks.0.ls1.gamma is there and not here"),
        ("uneven", uneven, r"encoder.pos_embed has 8 rows, which form no square of patches"),
        ("several", several, r"holds 2 encoders \(a., b.\); save one alone"),
        ("blocks", blocks, r"nothing in it matches a vision transformer .*and no patch_embed.proj.weight"),
    ):
        made = student()
        before = weights_of(made)
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(
            UserError, match=rf"^model.init_from={tmp_path}/{name}.safetensors: .*{says}"
        ) as error:
            load_initial_weights(made, tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
        assert all(torch.equal(before[n], p) for n, p in made.named_parameters()), name


def test_another_architecture_is_named_if_it_is_known(tmp_path: Path) -> None:
    small: Any = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(
        UserError,
        match=r"another architecture: encoder.blocks.0.attn.qkv.weight is 1152x384 there and 96x32 here; it has width "
        r"384 and depth 12, set model.name=vit_small or model.width/depth$",
    ):
        load_initial_weights(student(), tmp_path / "small.safetensors")
    dino: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56)
    save_file(dino.state_dict(), tmp_path / "dino.safetensors")
    with pytest.raises(
        UserError, match=r"ls1.gamma is there and not here; .*set model.name=vit_small_patch14_dinov2 or"
    ):
        load_initial_weights(
            Student(ModelConfig(name="vit_small", image_size=64), LossConfig(), E),
            tmp_path / "dino.safetensors",
        )


def test_heads_that_a_source_states_must_be_the_same(tmp_path: Path) -> None:
    original = student()
    write_checkpoint(tmp_path / "run", original, config_of(MODEL), E)
    release(tmp_path / "run", tmp_path / "release")
    for source in ("run", "release"):
        with pytest.raises(UserError, match=r"it has 4 heads there and 2 here"):
            load_initial_weights(student(heads=2), tmp_path / source)
    (tmp_path / "release" / "uniemox.json").unlink()
    assert json.loads((tmp_path / "release" / "config.json").read_text())["model_args"]["num_heads"] == 4
    with pytest.raises(UserError, match=r"it has 4 heads there and 2 here"):  # now a folder as timm writes it
        load_initial_weights(student(heads=2), tmp_path / "release")


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "halftimm").mkdir()
    (tmp_path / "halftimm" / "config.json").write_text("{}")
    (tmp_path / "notjson").mkdir()
    save_file(dict(vit().state_dict()), tmp_path / "notjson" / "model.safetensors")
    (tmp_path / "notjson" / "config.json").write_text("[1")
    (tmp_path / "junk.pth").write_bytes(b"not a file of weights at all")
    (tmp_path / "junk.safetensors").write_bytes(b"not a file of weights at all")
    (tmp_path / "nothing.pth").write_bytes(b"")
    mae.save(tmp_path / "cut.pth", mae.Shape())
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "numbers.pth")
    for name, says in (
        ("nowhere.pth", "no such file or folder"),
        ("empty", "holds no weights; give a folder in timm's local-dir layout, a release, or a run's folder"),
        ("halftimm", "lacks model.safetensors"),
        ("notjson", "config.json is not a JSON object"),
        ("junk.pth", "junk.pth is not readable as weights"),
        ("junk.safetensors", "junk.safetensors is not readable as weights"),
        ("nothing.pth", "nothing.pth is not readable as weights"),
        ("cut.pth", "cut.pth is not readable as weights"),
        (
            "module.pth",
            r"holds pickled code \(torch.nn.modules.linear.Linear\), which is not run; save its state dict",
        ),
        ("list.pth", "holds a list instead of tensors by name"),
        ("numbers.pth", "it has no tensors"),
    ):
        with pytest.raises(UserError, match=rf"^model.init_from={tmp_path}/{name}: .*{says}") as error:
            load_initial_weights(student(), tmp_path / name)
        assert "\n" not in str(error.value), name


def test_nothing_in_a_release_is_lost_that_a_checkpoint_had_fixed(tmp_path: Path) -> None:
    """Positions from other weights cannot be recomputed: a release takes them from the checkpoint."""
    mae.save(tmp_path / "mae.pth", mae.Shape(side=3))
    original = student()
    load_initial_weights(original, tmp_path / "mae.pth")
    write_checkpoint(tmp_path / "run", original, config_of(MODEL), E)
    release(tmp_path / "run", tmp_path / "release")
    encoder, rest = (load_file(tmp_path / "release" / f"{n}.safetensors") for n in ("model", "uniemox"))
    assert original.decoder is not None
    assert torch.equal(encoder["pos_embed"], original.encoder.state_dict()["pos_embed"])
    assert torch.equal(rest["decoder.pos_embed"], original.decoder.pos_embed)
