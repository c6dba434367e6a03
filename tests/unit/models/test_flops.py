"""Analytic FLOPs equal torch's count of the real modules; parts that are off do not count.

Modules live on the meta device: nothing is computed, and attention there is counted as its two products (the fused
kernel of a CPU is unknown to torch's counter and would count as nothing).
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from uniemox_dist.config.schema import BatchConfig, Config, LossConfig, ModelConfig, TeacherConfig
from uniemox_dist.models.flops import Flops, sample_flops, student_flops
from uniemox_dist.models.student import Student, Targets, Views
from uniemox_dist.teacher.flops import count_tower_flops, read_stated_tower

WITHIN = 0.02
B, E, G = 2, 512, 768
TINY: dict[str, Any] = {"name": "vit_tiny"}
"""ViT-Ti/16 at 224 pixels, with MAE's decoder."""


def counted(model: ModelConfig, loss: LossConfig, again: bool = False) -> tuple[float, float]:
    """FLOPs of a sample that torch counts in a student's forward, and in forward and backward together."""
    with torch.device("meta"):
        student = Student(model, loss, E if loss.needs_teacher else None).to("meta")
        pixels = torch.empty(B, 3, model.image_size, model.image_size, dtype=torch.uint8)
        order = torch.empty(B, model.patches, dtype=torch.long)
        person = (pixels, order) if student.has_person_branch else (None, None)
        views = Views(pixels, person[0], order, person[1])
        targets = Targets()
        if loss.needs_teacher:
            targets = Targets(torch.empty(B, E), torch.empty(G, E))
        student.encoder.grad_checkpointing = again
        if student.decoder is not None:
            student.decoder.grad_checkpointing = again
        with FlopCounterMode(display=False) as counter:
            total, _ = student(views, targets)
            forward = counter.get_total_flops()
            total.backward()
    return forward / B, counter.get_total_flops() / B


def expected(model: ModelConfig, loss: LossConfig) -> Flops:
    return student_flops(model, loss, E if loss.needs_teacher else None, G)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prior": (TINY, {}),
    "multi_head": ({**TINY, "fusion": "multi_head"}, {}),
    "attention": ({**TINY, "fusion": "attention"}, {}),
    "gated_mlp": ({**TINY, "fusion": "gated_mlp"}, {}),
    "no fusion": ({**TINY, "fusion": "none"}, {}),
    "no relation": (TINY, {"relation": 0}),
    "no reconstruction": (TINY, {"reconstruction": 0}),
    "reconstruction alone": (TINY, {"relation": 0, "similarity": 0}),
    "both views reconstructed": (TINY, {"person_reconstruction": True}),
    "both views, no teacher": (TINY, {"person_reconstruction": True, "relation": 0, "similarity": 0}),
    "no name, mask 0.9": ({"width": 192, "heads": 3, "depth": 4, "mask_ratio": 0.9}, {}),
    "registers": ({"name": "vit_small_patch14_reg4_dinov2", "image_size": 224}, {}),
    "gated MLPs": ({"name": "vit_giant_patch14_dinov2", "image_size": 224}, {}),
    "differential attention": ({"name": "vit_dwee_patch16_reg1_gap_256"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_of_a_student_are_torchs_within_two_percent(case: str) -> None:
    model, loss = ModelConfig(**CASES[case][0]), LossConfig(**CASES[case][1])
    forward, training = counted(model, loss)
    found = expected(model, loss)
    assert found.forward == pytest.approx(forward, rel=WITHIN)
    assert found.training == pytest.approx(training, rel=WITHIN)


@pytest.mark.parametrize("case", ["prior", "both views reconstructed", "gated MLPs"])
def test_recomputation_of_checkpointed_blocks_is_counted_separately(case: str) -> None:
    model, loss = ModelConfig(**CASES[case][0]), LossConfig(**CASES[case][1])
    found = expected(model, loss)
    assert found.executed == pytest.approx(counted(model, loss, again=True)[1], rel=WITHIN)
    assert found.executed > 1.1 * found.training


def test_a_loss_that_is_off_takes_its_parts_out_of_the_count() -> None:
    model = ModelConfig(**TINY)
    everything = expected(model, LossConfig())
    assert min(everything.encoder, everything.decoder, everything.fusion, everything.relation) > 0
    assert expected(model, LossConfig(relation=0)).relation == 0
    no_pixels = expected(model, LossConfig(reconstruction=0))
    assert (no_pixels.decoder, no_pixels.encoder) == (0, everything.encoder)
    pixels = expected(model, LossConfig(relation=0, similarity=0))
    assert (pixels.fusion, pixels.relation, pixels.encoder) == (0, 0, everything.encoder // 2)
    both = expected(model, LossConfig(person_reconstruction=True))
    assert both.decoder == 2 * everything.decoder
    alone = expected(ModelConfig(**TINY, fusion="none"), LossConfig())
    assert alone.encoder == everything.encoder // 2


def test_a_run_counts_the_teacher_only_where_it_runs_and_the_texts_it_compares_with() -> None:
    def of(source: str = "live", **loss: Any) -> Flops:
        config = Config.model_validate(
            {
                "run": {"max_steps": 1},
                "data": {"path": "somewhere"},
                "model": TINY,
                "loss": loss,
                "batch": BatchConfig(global_batch=96, micro_batch=4),
                "teacher": {"name": "shipped:demo", "source": source},
            }
        )
        return sample_flops(config, E if config.loss.needs_teacher else None, teacher=1000)

    assert of().teacher == 1000
    assert of().forward == of().student + 1000
    assert of().training == 3 * of().student + 1000
    assert of("cache").teacher == 0
    assert of(relation=0, similarity=0).teacher == 0
    assert of().relation == 4 * 96 * E
    assert of(relation_over="local").relation == 4 * 4 * E


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "ViT-B-32", "ViT-S-32-alt"])
def test_a_clip_tower_counts_the_same_from_its_file_from_its_modules_and_in_torch(name: str) -> None:
    model = open_clip.create_model(name, device="meta", load_weights=False)
    size = model.visual.image_size[0]
    stated = read_stated_tower(TeacherConfig(name=name))
    assert stated is not None
    assert stated[0] == model.visual.output_dim
    assert stated[1] == pytest.approx(count_tower_flops(model.visual, size), rel=WITHIN)


def test_towers_of_other_families_are_counted_from_their_modules() -> None:
    model = open_clip.create_model("RN50", device="meta", load_weights=False)
    assert count_tower_flops(model.visual, 224) == pytest.approx(12.2e9, rel=WITHIN)  # 6.1 G multiply-adds
    assert read_stated_tower(TeacherConfig(name="RN50")) == (1024, None)
    assert read_stated_tower(TeacherConfig(name="ViT-B-16-SigLIP")) == (768, None)
    assert read_stated_tower(TeacherConfig(name="no such model")) is None


def test_towers_in_folders_are_read_from_their_file(tiny_teacher: Path) -> None:
    model = open_clip.create_model(f"local-dir:{tiny_teacher}").eval()
    before = {name: tensor.clone() for name, tensor in model.visual.state_dict().items()}
    stated = read_stated_tower(TeacherConfig(name=f"local-dir:{tiny_teacher}"))
    assert stated == (32, pytest.approx(count_tower_flops(model.visual, 32), rel=WITHIN))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.visual.state_dict().items())
    shipped = read_stated_tower(TeacherConfig(name="shipped:demo"))
    assert shipped is not None
    assert shipped[0] == 128


def test_a_compiled_tower_is_counted_without_being_compiled_again(tiny_teacher: Path) -> None:
    visual = open_clip.create_model(f"local-dir:{tiny_teacher}").visual.eval()
    expected = count_tower_flops(visual, 32)

    def compiles(*_: Any) -> Any:
        raise AssertionError("compiled for counting")

    visual.compile(backend=compiles)
    assert count_tower_flops(visual, 32) == expected > 0


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys; from uniemox_dist.config.schema import *;"
        "from uniemox_dist.teacher.flops import read_stated_tower;"
        "from uniemox_dist.models.flops import student_flops;"
        "width, tower = read_stated_tower(TeacherConfig(name='ViT-B-16-quickgelu'));"
        "print(student_flops(ModelConfig(name='vit_large'), LossConfig(), width, 768, tower).training);"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == pytest.approx(245e9, rel=0.2)
