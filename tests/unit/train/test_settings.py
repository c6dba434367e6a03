"""Values that a run derives from its settings: schedule, accumulation, parameter groups, its place in the world."""

import math
import re

import pytest
import torch

from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config, LossConfig, ModelConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed.world import World
from uniemox_dist.models.student import Student
from uniemox_dist.train.engine import (
    choose_precision,
    decide_compile,
    deepspeed_config,
    find_clip_grad,
    graphs_fit,
    parameter_groups,
)
from uniemox_dist.train.schedule import Schedule


def config(*overrides: str) -> Config:
    return load_config("uniemox_vit_b16", overrides)


def test_the_papers_schedule_in_steps() -> None:
    schedule = Schedule.from_config(config(), 100_000)
    assert schedule.max_steps == math.ceil(200 * 100_000 / 768)
    assert schedule.warmup_steps == math.ceil(40 * 100_000 / 768)
    assert schedule.peak_lr == pytest.approx(1e-3 * 768 / 256)


def test_warm_up_is_linear_and_the_cosine_ends_at_min_lr() -> None:
    schedule = Schedule(max_steps=110, warmup_steps=10, peak_lr=1.0, min_lr=0.1, epoch_samples=1)
    assert [schedule.lr(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.lr(10) == pytest.approx(1.0)
    assert schedule.lr(60) == pytest.approx(0.55)
    assert schedule.lr(109) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    assert schedule.lr(110) == pytest.approx(0.1)


def test_the_weights_of_losses_follow_the_line_through_their_points() -> None:
    overrides = [
        "loss.relation=2",
        "loss.schedule.relation=[[0.25, 0], [0.75, 1]]",
        "run.max_steps=101",
        "run.epochs=null",
    ]
    overrides += ["optim.warmup_epochs=null"]
    schedule = Schedule.from_config(load_config("demo", overrides), 1000)
    assert [tuple(schedule.loss_weights(step).values()) for step in (0, 25, 50, 75, 100)] == [
        (0.0, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (1.0, 1.0, 1.0),
        (2.0, 1.0, 1.0),
        (2.0, 1.0, 1.0),
    ]
    weights = Schedule.from_config(load_config("demo"), 1000).loss_weights(3)
    assert weights == {"relation": 1.0, "similarity": 1.0, "reconstruction": 1.0}


def test_a_mix_measured_in_epochs_needs_the_size_of_an_epoch() -> None:
    by_weights = ("data.path=null", "data.sources=[{path: a, weight: 2}, {path: b}]")
    with pytest.raises(UserError, match=r"needs data\.epoch_samples, or a repeat for each"):
        config(*by_weights)
    assert config(*by_weights, "data.epoch_samples=10").data.epoch_samples == 10
    assert config(
        "data.path=null", "data.sources=[{path: a, repeat: 2}, {path: b, repeat: 1}]"
    ).data.by_repeats
    with pytest.raises(UserError, match=r"data\.sources\.1 has no repeat where others have one"):
        config("data.path=null", "data.sources=[{path: a, repeat: 2}, {path: b}]")


@pytest.mark.parametrize(("ranks", "micro", "expected"), [(1, 32, 24), (8, 32, 3), (24, 32, 1), (96, 8, 1)])
def test_accumulation_is_derived(ranks: int, micro: int, expected: int) -> None:
    assert config(f"batch.micro_batch={micro}").batch.grad_accum(ranks) == expected


def test_accumulation_that_does_not_come_out_even_names_a_fix() -> None:
    with pytest.raises(UserError, match=r"try batch.micro_batch=24"):
        config("batch.micro_batch=25").batch.grad_accum(8)
    with pytest.raises(UserError, match=r"use (6|8) ranks"):
        config().batch.grad_accum(7)


def test_weight_decay_is_on_matrices_only() -> None:
    model = ModelConfig(
        image_size=32, patch_size=8, width=32, depth=1, heads=2, decoder_width=16, decoder_heads=2
    )
    student = Student(model, LossConfig(), 8)
    names = {id(p): name for name, p in student.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(student, 0.05))
    assert "encoder.patch_embed.proj.weight" in decayed
    assert {"encoder.cls_token", "decoder.mask_token", "fusion.weight", "fusion.norm.weight"} <= plain
    assert all(name.endswith("weight") for name in decayed)
    assert decayed | plain == {n for n, p in student.named_parameters() if p.requires_grad}


def test_the_deepspeed_configuration_merges_the_passthrough_last_but_keeps_batches_ours() -> None:
    cpu = torch.device("cpu")
    ours = deepspeed_config(config("zero.stage=2"), 8, "bf16", cpu)["zero_optimization"]
    made = deepspeed_config(
        config("zero.stage=2", "deepspeed.zero_optimization.reduce_bucket_size=1000"), 8, "bf16", cpu
    )
    assert made["zero_optimization"] == {**ours, "reduce_bucket_size": 1000} != ours
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (768, 3)
    assert made["bf16"]["enabled"]
    with pytest.raises(UserError, match=r"deepspeed.train_batch_size: is derived"):
        deepspeed_config(config("deepspeed.train_batch_size=1"), 8, "fp32", cpu)


def test_precision_is_taken_as_asked_or_measured() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("auto", cpu) in ("fp32", "bf16")


def test_the_world_is_read_from_torchrun_or_slurm() -> None:
    meet = {"MASTER_ADDR": "a", "MASTER_PORT": "1234"}
    assert World.from_env({}) == World()
    assert World.from_env({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **meet}) == World(
        3, 8, 1, "a", 1234
    )
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "9",
        **meet,
    }
    assert World.from_env(slurm) == World(5, 6, 1, "a", 1234)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        World.from_env({"RANK": "0", "WORLD_SIZE": "2"})
    # Slurm's variables state where ranks meet; MASTER_ADDR and MASTER_PORT take precedence.
    alone = {
        **{key: slurm[key] for key in slurm if key not in meet},
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "40017",
    }
    alone["SLURM_JOB_NODELIST"] = "gpu[007-009]"
    assert World.from_env(alone) == World(5, 6, 1, "gpu007", 20017)
    assert World.from_env({**alone, "SLURM_STEP_NODELIST": "gpu[008-009]"}) == World(5, 6, 1, "gpu008", 20017)
    assert World.from_env({**alone, "SLURM_STEP_ID": "1"}).master_port == 27936
    assert World.from_env({**alone, **meet}) == World(5, 6, 1, "a", 1234)
    # A batch script runs outside srun, with one task; if it waited for several, none would come.
    with pytest.raises(UserError, match="with srun in a batch job"):
        World.from_env(
            {
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
                "SLURM_NTASKS": "4",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "n[1-2]",
            }
        )
    assert World.from_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == World()
    # Ranks that never meet share work by their numbers: a batch script outside of srun does all of it.
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert World.from_env(batch, meets=False) == World()
    assert World.from_env({**batch, "SLURM_STEP_ID": "0"}, meets=False) == World(0, 4, 0)


@pytest.mark.parametrize("wanted", ["auto", "false"])
def test_compile_auto_is_off_on_a_cpu(wanted: str) -> None:
    assert not decide_compile(config(f"compute.compile={wanted}"), World(), torch.device("cpu"))


def test_compile_auto_is_off_with_one_line_if_a_gpu_node_has_no_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = "there is no C compiler (gcc or clang)"
    monkeypatch.setattr("uniemox_dist.train.engine.find_obstacle", lambda kind: obstacle)
    gpu = torch.device("cuda")
    assert not decide_compile(config("compute.compile=auto"), World(), gpu)
    assert caplog.messages == [f"compute.compile=auto: off, because {obstacle}"]
    with pytest.raises(
        UserError, match=r"compute\.compile=true: there is no C compiler .*compute.compile=false"
    ):
        decide_compile(config("compute.compile=true"), World(), gpu)


@pytest.mark.parametrize(
    ("stage", "accumulation", "more", "fits"),
    [
        (1, 1, (), True),
        (1, 2, (), False),  # gradients would be kept in a graph's memory over two micro-batches
        (2, 2, (), True),
        (3, 1, (), False),  # weights move
        (2, 1, ("compute.checkpoint_blocks=true",), False),
    ],
)
def test_cuda_graphs_are_used_if_weights_and_gradients_stay_in_place(
    stage: int, accumulation: int, more: tuple[str, ...], fits: bool
) -> None:
    sizes = ("batch.global_batch=768", f"batch.micro_batch={768 // accumulation}", f"zero.stage={stage}")
    assert graphs_fit(config(*sizes, *more), world_size=1) == fits


def test_deepspeeds_name_of_the_clipping_norm_is_honoured_and_deepspeed_itself_never_clips() -> None:
    for overrides, norm in (
        (["optim.clip_grad=0"], 0.0),
        (["optim.clip_grad=2"], 2.0),
        (["optim.clip_grad=2", "deepspeed.gradient_clipping=0.5"], 0.5),
    ):
        of = config(*overrides)
        assert find_clip_grad(of) == norm
        settings = deepspeed_config(of, 1, "bf16", torch.device("cpu"))
        assert (settings["gradient_clipping"], settings["bf16"]["check_grad_overflow"]) == (0.0, False)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        *(
            (
                f"deepspeed.gradient_clipping={bad}",
                "is not a norm; give a number from 0, or set optim.clip_grad",
            )
            for bad in (".nan", ".inf", "-1", "abc", "null", "true", "[1]")
        ),
        ("deepspeed.bf16.check_grad_overflow=maybe", "check_grad_overflow=maybe: give true or false"),
        ("deepspeed.bf16=true", "deepspeed.bf16=True: is a section; set its keys, as deepspeed.bf16.KEY="),
        ("deepspeed.zero_optimization=5", "deepspeed.zero_optimization=5: is a section"),
        ("deepspeed.zero_optimization.stage=2", "deepspeed.zero_optimization.stage: set zero.stage"),
        ("deepspeed.gradient_accumulation_steps=2", "is derived from batch.*; set it there"),
    ],
)
def test_keys_of_deepspeed_that_the_run_uses_are_checked_with_all_other_settings(
    override: str, says: str
) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        config(override)
