"""Memory, exchanges and devices of a plan, worked out by hand for small cases."""

from typing import Any

import pytest
import torch

from launch.plan.activations import count_activations
from launch.plan.engine import BUCKET, EngineMemory, engine_memory
from launch.plan.memory import (
    Memory,
    choose_micro_batches,
    choose_precision,
    count_memory,
    list_stages,
    recommend,
)
from launch.plan.model import Tower, count_outputs, read_tower
from launch.plan.network import Traffic, list_exchanges, network_time
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import DEVICES, GIB, find_device
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.classifier import Classifier, Outputs
from uniemox_dist.models.parameters import Parameter, student_parameters
from uniemox_dist.models.student import Student, Targets, Views

PARAMETERS = (
    Parameter("encoder.blocks.0.attn.qkv.weight", (10, 30)),
    Parameter("encoder.blocks.0.attn.qkv.bias", (10,)),
    Parameter("encoder.pos_embed", (1, 4, 5), trained=False),
    Parameter("to_decoder.weight", (10, 20)),
    Parameter("to_decoder.bias", (5,)),
)
"""500 numbers of matrices (300 of the encoder), 15 others (10), and 20 that are not trained."""


def engine(stage: int, ranks: int, precision: str, *pairs: str) -> EngineMemory:
    config = load_config("demo", ["optim.ema_decay=0.9", *pairs])
    return engine_memory(config, PARAMETERS, stage=stage, ranks=ranks, precision=precision, gpu=True)


def test_stage_0_keeps_everything_in_fp32() -> None:
    alone = engine(0, 1, "fp32")
    assert alone == EngineMemory(4 * 535, 4 * 535, 4 * 515, 8 * 515, 4 * 310, 0, 0)
    assert engine(0, 4, "fp32").ema == 4 * 78  # 310 numbers, a quarter each


def test_stages_1_and_2_cut_each_group_into_equal_partitions() -> None:
    """Of 500 and 15 numbers, 3 ranks hold 168 and 6: two thirds of a multiple of 6."""
    one, two = engine(1, 3, "bf16"), engine(2, 3, "bf16")
    assert one.weights == 2 * (3 * (168 + 6) + 20)
    assert one.optimiser == two.optimiser == 12 * (168 + 6)
    assert one.gradients == 2 * 515
    assert two.gradients == 2 * (168 + 6)
    assert engine(2, 2, "bf16").gradients == 2 * (250 + 8)
    # Rank 0 has 168 of the encoder's matrix and 6 of its bias.
    assert one.ema == 4 * (168 + 6)
    assert one.buffers == 3 * 2 * BUCKET  # two in turn, and a flat copy
    assert two.buffers == 4 * 2 * BUCKET  # and the gradients that will fill the next
    assert engine(1, 1, "fp32").buffers == 0
    assert (one.step_copy, engine(1, 3, "fp32").step_copy) == (4 * 168, 0)


def test_stage_3_cuts_each_parameter_and_gathers_it_for_its_use() -> None:
    small = engine(3, 2, "fp32")
    shards = 150 + 5 + 100 + 3
    assert small.optimiser == 12 * shards
    assert small.gradients == 4 * shards
    assert small.weights == small.resting == 4 * (shards + 10 + 535)  # all are small enough to stay whole
    threshold = "deepspeed.zero_optimization.stage3_param_persistence_threshold=100"
    cut = engine(3, 2, "fp32", threshold)
    assert cut.resting == 4 * (shards + 10 + 35)
    assert cut.weights == small.weights  # in a pass all are there: they come again soon enough
    tight = (
        threshold,
        "deepspeed.zero_optimization.stage3_max_reuse_distance=200",
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size=50",
    )
    assert engine(3, 2, "fp32", *tight).weights == 4 * (shards + 10 + 35 + 100 + 50)
    assert engine(3, 1, "fp32").weights == 4 * 535  # a piece is the whole


MODELS: dict[str, list[str]] = {
    "plain": [],
    "both views": ["loss.person_reconstruction=true"],
    "no pixels": ["loss.reconstruction=0"],
    "pixels alone": ["loss.relation=0", "loss.similarity=0"],
    "norm_pix": ["loss.norm_pix=true"],
    "LayerScale": ["model.name=deit3_small_patch16_224"],
    "registers": ["model.name=vit_medium_patch16_reg4_gap_256"],
    "norm before": ["model.name=vit_xsmall_patch16_clip_224"],
    "norm behind": ["model.name=vit_base_patch16_rpn_224"],
}
SLOW = ("registers", "norm behind")
SHAPE = ["model.width=192", "model.depth=4", "model.heads=3"]
NAMED = [f"model.{key}=null" for key in ("width", "depth", "heads", "mlp_ratio")]
B, E = 3, 64


def kept_for_backward(config: Config, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a real forward pass, without weights and without what it was given."""
    torch.manual_seed(0)
    needs = config.loss.needs_teacher
    student = Student(config.model, config.loss, E if needs else None).to(dtype)
    for part in (student.encoder, student.decoder):
        if part is not None:
            part.grad_checkpointing = config.compute.checkpoint_blocks
    side, N = config.model.image_size, config.model.patches

    def view() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8), torch.rand(B, N).argsort(1)

    scene, person = view(), view() if student.has_person_branch else (None, None)
    given = {
        t.untyped_storage().data_ptr() for t in (*student.parameters(), *scene, *person) if t is not None
    }
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in given:
            kept[place] = tensor
        return tensor

    targets = Targets(torch.randn(B, E), torch.randn(B, E)) if needs else Targets()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(Views(scene[0], person[0], scene[1], person[1]), targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *[(case, torch.float32) for case in MODELS if case not in SLOW],
        ("plain", torch.bfloat16),
        pytest.param("norm before", torch.bfloat16, marks=pytest.mark.slow),
        *[pytest.param(case, torch.float32, marks=pytest.mark.slow) for case in SLOW],
    ],
)
def test_the_activations_match_the_tensors_that_autograd_keeps(case: str, dtype: torch.dtype) -> None:
    shape = NAMED if any("model.name" in pair for pair in MODELS[case]) else SHAPE
    sizes = ["model.image_size=96", "model.patch_size=16", "model.decoder_width=64", *shape]
    config = load_config("demo", ["loss.relation_over=local", *sizes, *MODELS[case]])
    assert plan_of(config, dtype) == pytest.approx(kept_for_backward(config, dtype), rel=0.01)


CLASSIFIERS: dict[str, list[str]] = {
    "mean": [],
    "token": ["finetune.pooling=token"],
    "persons": ["finetune.persons=true"],
    "drop path": ["model.drop_path=0.3"],
    "blocks again": ["compute.checkpoint_blocks=true"],
    "registers": ["model.name=vit_medium_patch16_reg4_gap_256"],
    "norm before": ["model.name=vit_xsmall_patch16_clip_224"],
}


def kept_by_classifier(config: FinetuneRun, dtype: torch.dtype) -> int:
    torch.manual_seed(0)
    settings = config.finetune
    outputs = Outputs("single", ("joy", "fear"), persons=settings.persons, pooling=settings.pooling)
    classifier = Classifier(config.model, outputs).to(dtype)
    classifier.encoder.set_grad_checkpointing(config.compute.checkpoint_blocks)
    shape = (B, 3, config.model.image_size, config.model.image_size)
    scene, person = (torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2))
    given = {t.untyped_storage().data_ptr() for t in (*classifier.parameters(), scene, person)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in given:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        classifier(scene, person if settings.persons else None, torch.eye(2)[[0, 1, 0]])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*[(case, torch.float32) for case in CLASSIFIERS], ("mean", torch.bfloat16), ("token", torch.bfloat16)],
)
def test_the_activations_of_a_classifier_match_the_tensors_that_autograd_keeps(
    case: str, dtype: torch.dtype
) -> None:
    named = any("model.name" in pair for pair in CLASSIFIERS[case])
    shape = NAMED if named else ["model.name=null", *SHAPE]
    sizes = ["data.path=d", "model.image_size=96", "model.patch_size=16", "model.drop_path=0", *shape]
    config = load_config("finetune", [*sizes, *CLASSIFIERS[case]])
    assert isinstance(config, FinetuneRun)
    within = 0.05 if config.compute.checkpoint_blocks else 0.01
    assert plan_of(config, dtype) == pytest.approx(kept_by_classifier(config, dtype), rel=within)


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ([], 8),
        (["finetune.labels=[a, b, c]", "finetune.dimensions=[valence]"], 4),
        (["finetune.target=distribution", "finetune.dimensions=[valence, arousal]"], 10),
        (["finetune.target=dimensions", "finetune.dimensions=[valence, arousal]"], 2),
        (["finetune.task=multi"], 29),
        (["finetune.task=multi", "finetune.dimensions=[arousal]"], 27),
        (["finetune.task=multi", "finetune.dimension_weight=0"], 26),
    ],
)
def test_a_classifier_has_an_output_for_each_label_and_dimension(settings: list[str], outputs: int) -> None:
    config = load_config("finetune", ["data.path=d", *settings])
    assert isinstance(config, FinetuneRun)
    assert count_outputs(config) == outputs


def plan_of(config: Config, dtype: torch.dtype) -> int:
    precision = "fp32" if dtype == torch.float32 else "bf16"
    tower = Tower(E if config.loss.needs_teacher else None)
    return count_activations(config, tower, B, precision, gpu=False).kept(
        checkpointed=config.compute.checkpoint_blocks
    )


def test_checkpointed_blocks_keep_only_their_inputs() -> None:
    config = load_config(
        "demo",
        ["loss.relation_over=local", "compute.checkpoint_blocks=true", "model.width=192", "model.heads=3"],
    )
    assert plan_of(config, torch.float32) == pytest.approx(kept_for_backward(config, torch.float32), rel=0.05)


def test_devices_are_found_by_the_names_that_operators_use() -> None:
    assert all(d.fp32_tflops and d.memory_bytes and d.link_gb_s and d.is_gpu for d in DEVICES)
    h100 = find_device("h100", None)
    assert (h100.memory_bytes, h100.bf16_tflops, h100.fp32_tflops) == (80 * GIB, 989.4, 66.9)
    assert find_device("A100-40GB", None).memory_bytes == 40 * GIB
    assert find_device("rtx-6000-ada", None).name == "RTX 6000 Ada"
    assert find_device("h100", 64.0).memory_bytes == 64e9
    assert not find_device("v100", None).has_bf16
    own = find_device("gaudi3", 128.0)
    assert (own.memory_bytes, own.has_bf16, own.peak("bf16")) == (128e9, True, None)
    assert not find_device("CPU", None).is_gpu
    with pytest.raises(
        UserError, match=r"--gpu=h10: not in the table; nearest: h100.*; or cpu, or state --gpu-mem"
    ):
        find_device("h10", None)


def test_the_number_format_is_the_one_that_a_run_uses() -> None:
    config = load_config("demo")
    assert choose_precision(config, find_device("h100", None), 1) == "bf16"
    assert choose_precision(config, find_device("h100", None), 0) == "fp32"
    assert choose_precision(config, find_device("t4", None), 1) == "fp32"
    assert choose_precision(config, find_device("cpu", None), 1) == "fp32"
    stated = load_config("demo", ["optim.precision=bf16"])
    assert choose_precision(stated, find_device("cpu", None), 1) == "bf16"
    assert (list_stages(config), list_stages(stated)) == ([0, 1, 2, 3], [1, 2, 3])


def whole(*pairs: str, stage: int = 1, micro_batch: int = 48, checkpointed: bool = False) -> Memory:
    config = load_config("demo", list(pairs))
    tower = read_tower(config)
    parameters = student_parameters(config.model, config.loss, tower.embedding_width)
    return count_memory(
        config,
        parameters,
        tower,
        find_device("a100", None),
        stage=stage,
        micro_batch=micro_batch,
        ranks=2,
        checkpointed=checkpointed,
    )


def test_more_samples_need_more_and_checkpointed_blocks_less() -> None:
    one, two = whole(micro_batch=24), whole(micro_batch=48)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    assert two.weights == one.weights
    assert whole(checkpointed=True).total < two.total
    parts = (two.weights, two.gradients, two.optimiser, two.activations, two.teacher, two.buffers, two.views)
    assert max(parts) < two.allocated <= sum(parts)
    assert two.total == two.allocated + two.context


def test_the_recommendation_is_the_smallest_stage_with_its_largest_micro_batch() -> None:
    def at(stage: int, micro_batch: int, total: int) -> Memory:
        return Memory(stage, micro_batch, "bf16", *[0] * 9, allocated=total)

    device = find_device("other", 10.0)  # a tenth stays free
    table = [at(0, 8, 1), at(1, 4, 8 * 10**9), at(1, 8, 12 * 10**9), at(2, 4, 10**9), at(2, 8, 9 * 10**9)]
    assert recommend(table, device, 8) == table[4]
    assert recommend(table, device, 4) == table[1]
    assert recommend(table[:3], device, 8) == table[1]  # less than the recipe's, but it runs
    assert recommend(table, find_device("other", 0.5), 8) is None
    assert recommend(table, find_device(None, None), 8) is None


def test_micro_batches_around_the_recipes_are_shown() -> None:
    config = load_config("uniemox_vit_b16")  # 96 samples a rank of 8
    assert choose_micro_batches(config, 8) == [16, 24, 32, 48, 96]


def exchanges(stage: int, precision: str = "bf16", *pairs: str) -> dict[str, tuple[str, int]]:
    config = load_config("demo", list(pairs))
    found = list_exchanges(config, PARAMETERS, 128, stage=stage, precision=precision, micro_batches=3)
    return {t.what: (t.operation, t.bytes) for t in found}


def test_the_traffic_of_a_step_by_stage() -> None:
    captions = {"caption vectors": ("all-gather", 2 * 96 * 128)}
    gradients = {"gradients, once a step": ("all-reduce", 4 * 515)}
    assert exchanges(0, "fp32") == {**gradients, **captions}
    assert exchanges(1) == {
        "gradients, once a step": ("all-reduce", 2 * 515),
        "updated weights": ("all-gather", 2 * 515),
        **captions,
    }
    assert exchanges(2)["gradients, each micro-batch"] == ("all-reduce", 3 * 2 * 515)
    assert exchanges(3)["gradients, each micro-batch"] == ("reduce-scatter", 3 * 2 * 515)
    assert exchanges(3)["updated small weights"] == ("all-gather", 2 * 535)
    assert "caption vectors" not in exchanges(1, "bf16", "loss.relation_over=local")


def test_a_ring_sends_all_but_one_share_and_its_slowest_link_decides() -> None:
    assert Traffic("x", "all-reduce", 1000).sent(4) == 1500
    assert Traffic("x", "all-gather", 1000).sent(4) == 750
    assert Traffic("x", "all-reduce", 1000).sent(1) == 0
    both: dict[str, Any] = {"link_gb_s": 100.0, "network_gbit_s": 80.0}
    time = network_time(5e9, nodes=2, per_node=8, **both)
    assert (time.within_s, time.between_s, time.seconds) == (0.05, 0.5, 0.5)
    assert network_time(5e9, nodes=1, per_node=8, **both).seconds == 0.05
    assert network_time(5e9, nodes=2, per_node=8, link_gb_s=100.0, network_gbit_s=None).seconds is None
    assert network_time(5e9, nodes=1, per_node=1, link_gb_s=None, network_gbit_s=None).seconds == 0.0
