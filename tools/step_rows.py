"""The training steps that bench_step.py and profile_step.py run, all with the same weights.

(a) ours with a live teacher; (a') ours with cached teacher embeddings, without its image tower; (b) the released code's
schedule: an encoder pass and a decoder pass for each view, the teacher outside no_grad, its text tower in every step,
relations within the micro-batch, no detector; (c) plain MAE: the scene and L3 only.
(a), (a') and (c) are the training step itself; (b) is in released_step.py.
Learning rates are 0, so all work is done but every step uses the same weights.
"""

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from options import add_settings, positive_int, ratio, teacher_shape
from released_step import Released, device
from torch import Tensor, nn

from uniemox_dist.config.load import merge, parse_override, validate_config
from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.config.schema import Config, LossConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import write_json
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.masks import SlotDraws
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.distributed.world import World
from uniemox_dist.models.compilation import compile_options
from uniemox_dist.models.drop_path import list_rates
from uniemox_dist.models.student import Student, Targets
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.train.engine import parameter_groups
from uniemox_dist.train.pretrain import make_views, prepare_loss
from uniemox_dist.train.step import StepResult, update_weights

ROWS = {
    "a": "ours, live teacher",
    "a'": "ours, cached teacher",
    "b": "the released code's schedule",
    "c": "plain MAE",
}
CLIP_MEAN, CLIP_STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
CAPTION = (
    "The scene type of this photo is park. The main subjects are tree, dog and child. The image has a brightness of "
    "0.6 and color saturation of 0.4. Facial expression of the person is smile. The action being performed is running."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that determine the work of a step; both tools have them."""
    parser.add_argument(
        "--model", default="vit_base_patch16_224", help="the student's encoder, a name of timm's"
    )
    parser.add_argument("--micro-batch", type=positive_int, default=8)
    parser.add_argument("--mask", type=ratio, nargs="+", default=[0.75, 0.9], help="mask ratios")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of student and teacher"
    )
    parser.add_argument(
        "--teacher-shape",
        type=teacher_shape,
        default="ViT-B-16-quickgelu",
        help="an open_clip model, with random weights, or local-dir:PATH",
    )
    add_settings(parser)
    parser.add_argument(
        "--engine", choices=["plain", "deepspeed"], default="plain", help="of (a), (a') and (c)"
    )


class PlainEngine:
    """The part of an engine that training uses, in plain torch, with fp32 master weights like ZeRO."""

    def __init__(self, module: nn.Module, weight_decay: float, betas: tuple[float, float]) -> None:
        self.module, self.device = module, device()
        groups = parameter_groups(module, weight_decay)
        self.trained = [p for group in groups for p in group["params"]]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trained]
        master_of = dict(zip(self.trained, self.masters))
        groups = [{**group, "params": [master_of[p] for p in group["params"]]} for group in groups]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def zero_optimization(self) -> bool:
        return False

    def zero_optimization_stage(self) -> int:
        return 0

    @torch.no_grad()
    def step(self) -> None:
        rounded = [pair for pair in zip(self.trained, self.masters) if pair[0] is not pair[1]]
        if rounded:
            weights, masters = map(list, zip(*rounded))
            for master in masters:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for master in masters], [weight.grad for weight in weights])
        self.optimizer.step()
        if rounded:
            torch._foreach_copy_(weights, masters)
        for tensor in (*self.trained, *self.masters):
            tensor.grad = None


@dataclass
class Setting:
    """Weights, a batch and their settings."""

    config: Config
    student: Student
    """fp32."""
    teacher: Teacher
    clip: Any
    """The teacher's model with both towers in fp32, for the released schedule."""
    batch: MicroBatch
    """Contains the teacher's embeddings."""
    captions: list[str]
    engine: str
    precision: str
    compiles: bool = False
    """Compile the passes of (a), (a') and (c), as `compute.compile` does."""
    _ours: Any = None

    def of(self, row: str) -> Callable[[], Any]:
        """Returns the step of a row, which can be called repeatedly."""
        if row == "b":
            return Released(self).step
        if row == "c":
            loss = LossConfig(relation=0, similarity=0)
            config = self.config.model_copy(update={"loss": loss})
            student = Student(config.model, loss, None)
            student.load_state_dict(self.student.state_dict(), strict=False)
        else:
            config, student = self.config, self.student
        batch = self.batch if row == "a'" else replace(self.batch, pictures_BE=None)
        teacher = self.teacher if row == "a" else None
        engine = self._ours if row != "c" and self._ours else self._engine(student, config)
        if row != "c":
            self._ours = engine

        def step() -> StepResult:
            loss = prepare_loss(engine, teacher, [batch], config, World())
            return update_weights(engine, loss, [batch], World(), lr=0.0, term_names=LOSS_NAMES)

        return step

    def bare_loop(self) -> Callable[[], Any]:
        """Returns the step of a bare loop in plain torch with the student, batch and cached embeddings of (a'):
        forward and backward pass, update, and reading the loss. It computes no norm and checks nothing."""
        engine = PlainEngine(
            self._in_precision(self.student), self.config.optim.weight_decay, self.config.optim.betas
        )

        def step() -> float:
            views = make_views(self.batch)
            total, _ = engine(views, Targets(self.batch.pictures_BE, self.batch.texts_BE))
            engine.backward(total)
            engine.step()
            return float(total)

        return step

    def _in_precision(self, student: Student) -> Student:
        student = copy.deepcopy(student).to(device())
        return student.bfloat16() if self.precision == "bf16" else student

    def _engine(self, student: Student, config: Config) -> Any:
        if self.engine == "deepspeed":
            from uniemox_dist.distributed import collectives
            from uniemox_dist.train.engine import make_engine

            if not torch.distributed.is_initialized():
                collectives.init(World(), 600)
            student = copy.deepcopy(student).to(device())
            return make_engine(student, config, World(), self.precision, device(), compiles=self.compiles)
        student = self._in_precision(student)
        if self.compiles:
            student.compile_parts(compile_options())
        return PlainEngine(student, config.optim.weight_decay, config.optim.betas)


def make_config(options: argparse.Namespace, mask: float) -> Config:
    """The configuration of a step.

    Raises:
        UserError: if the options are no valid one.
    """
    B = options.micro_batch
    values: dict[str, Any] = {
        "run": {"max_steps": 1},
        "data": {"path": "none"},
        "batch": {"global_batch": B, "micro_batch": B, "streams": 1},
        "model": {"name": options.model, "mask_ratio": mask},
        "teacher": {"name": "shipped:demo", "precision": options.precision},
        "optim": {"precision": options.precision},
    }
    for pair in options.set:
        values = merge(values, parse_override(pair))
    config = validate_config(values, "--model and --set")
    if not (config.loss.relation and config.loss.similarity and config.loss.reconstruction):
        raise UserError("--set: the released schedule has all three losses; switch none off")
    return config


def setting(options: argparse.Namespace, mask: float) -> Setting:
    """Creates random weights and a random batch, deterministic for given options."""
    config, B = make_config(options, mask), options.micro_batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.teacher_shape.startswith("local-dir:"):
            folder = Path(options.teacher_shape.removeprefix("local-dir:"))
        else:
            write_teacher(options.teacher_shape, folder)
        at = f"local-dir:{folder}"
        teacher = Teacher(config.teacher.model_copy(update={"name": at}), device())
        clip = open_clip.create_model(at, require_pretrained=True).eval().requires_grad_(False).to(device())
    torch.manual_seed(0)
    student = Student(config.model, config.loss, teacher.width)
    captions = [f"{CAPTION} Picture {i}." for i in range(B)]
    size = config.model.image_size
    pixels = torch.randint(0, 256, (2, B, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    scene, person = pixels.to(device())
    slots = torch.arange(B)
    draws = SlotDraws(config.model, config.run.seed, drop_rates=list_rates(student))
    drawn = draws.draw(slots, None, with_person=True)
    batch = MicroBatch(
        slots_B=slots.to(device()),
        scene_B3HW=scene,
        person_B3HW=person,
        texts_BE=teacher.embed_texts(captions),
        pictures_BE=teacher.embed_pictures(scene),
        on_person_BN=None,
        keys=tuple(map(str, range(B))),
        sources=(0,) * B,
        damaged=(),
        counts=ReadCounts(),
        **{name: tensor.to(device()) for name, tensor in drawn.items()},
    )
    teacher.drop_text_tower()
    return Setting(config, student, teacher, clip, batch, captions, options.engine, options.precision)


def write_teacher(name: str, folder: Path) -> None:
    """Writes an open_clip model with random weights as a local-dir; its time does not depend on the weights."""
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name, load_weights=False)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD}
    write_json(
        folder / "open_clip_config.json",
        {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess},
    )


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Makes torch's FLOP counter see every product inside the block.

    The counter knows neither the CPU's fused attention nor the fast path of nn.MultiheadAttention.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def orders_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """Returns our masks of the batch, to compare (b) with (a)."""
    views = make_views(setting.batch)
    assert views.person_order_BN is not None  # the method has both branches
    return views.scene_order_BN, views.person_order_BN
