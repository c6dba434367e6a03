"""Measures the memory of one rank's engine from its own tensors, beside the plan's estimate: for bench_plan_memory.py
and the tests that compare the plan with the engine."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.plan.engine import engine_memory
from launch.plan.memory import choose_precision
from launch.plan.model import ASSUMED_LABELS, Tower, list_trained_parameters
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import Device
from uniemox_dist.distributed.deepspeed_internals import list_flat_partitions, list_trained
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier, Outputs
from uniemox_dist.models.student import Student, Targets, Views
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import make_engine

PARTS = ("weights", "resting", "gradients", "optimiser", "ema")


class Measuring:
    """Runs an engine on random pictures and records the peak bytes of each of its parts."""

    def __init__(
        self, config: Config, world: World, device: torch.device, *, embedding_width: int, precision: str
    ) -> None:
        self.config, self.device, self._width = config, device, embedding_width
        torch.manual_seed(0)
        self.student = _module(config, embedding_width)
        self.engine = make_engine(self.student, config, world, precision, device)
        self.ema = Ema(self.engine, config.optim.ema_decay) if config.optim.ema_decay else None
        self.micro_batches = config.batch.global_batch // (config.batch.micro_batch * world.size)
        self.most = dict.fromkeys(PARTS, 0)
        for block in self.student.encoder.blocks:
            block.register_forward_pre_hook(lambda *_: self._see("weights"))
        # In stages 0 and 1 all gradients exist at the end of the backward pass.
        for name, p in list_trained(self.engine):
            if config.zero.stage < 2 and name.startswith(("encoder.cls_token", "encoder.patch_embed")):
                p.register_post_accumulate_grad_hook(lambda _: self._see("gradients"))

    def step(self, teacher: nn.Module | None = None, size: int = 0) -> None:
        """Makes one optimizer step. A picture tower, if given, embeds the pictures of each micro-batch."""
        for _ in range(self.micro_batches):
            total, _ = self.engine(*self._batch(teacher, size))
            self.engine.backward(total)
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()
        self._see("gradients")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 1e-5
        self.engine.step()
        if self.ema is not None:
            self.ema.update()
        self._see("resting", "optimiser", "ema")

    def _see(self, *parts: str) -> None:
        found = engine_bytes(self.engine, self.ema)
        for part in parts:
            self.most[part] = max(self.most[part], found["weights" if part == "resting" else part])

    def _batch(self, teacher: nn.Module | None, size: int) -> tuple[Any, ...]:
        B, model, device = self.config.batch.micro_batch, self.config.model, self.device
        shape = (B, 3, model.image_size, model.image_size)

        def pixels() -> Tensor:
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

        def order() -> Tensor:
            return torch.rand(B, model.patches, device=device).argsort(1)

        if isinstance(self.student, Classifier):
            outputs = self.student.outputs
            targets_BC = torch.eye(len(outputs.names), device=device)[torch.arange(B) % len(outputs.names)]
            return pixels(), pixels() if outputs.persons else None, targets_BC
        person = (pixels(), order()) if self.student.has_person_branch else (None, None)
        G = self.config.batch.global_batch
        pictures, texts = (F.normalize(torch.randn(n, self._width, device=device), dim=1) for n in (B, G))
        scene = pixels()
        if teacher is not None:
            pictures = _embed(teacher, scene, size)
        return Views(scene, person[0], order(), person[1]), Targets(pictures, texts)


def _module(config: Config, embedding_width: int) -> Student | Classifier:
    if not isinstance(config, FinetuneRun):
        return Student(config.model, config.loss, embedding_width)
    settings = config.finetune
    labels = settings.labels or tuple(f"label {i}" for i in range(ASSUMED_LABELS))
    outputs = Outputs("single", labels, persons=settings.persons, pooling=settings.pooling)
    return Classifier(config.model, outputs)


@torch.no_grad()
def _embed(teacher: nn.Module, pixels_B3HW: Tensor, size: int) -> Tensor:
    """Embeds pictures like teacher/model.py."""
    dtype = next(teacher.parameters()).dtype
    pixels = (pixels_B3HW.float() / 255).to(dtype)
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True).to(dtype)
    return F.normalize(teacher(pixels).float(), dim=1)


def planned(config: Config, ranks: int, device: Device, *, embedding_width: int) -> dict[str, int]:
    """The plan's estimate of the same parts."""
    found = engine_memory(
        config,
        list_trained_parameters(config, Tower(embedding_width)),
        stage=config.zero.stage,
        ranks=ranks,
        precision=choose_precision(config, device, config.zero.stage),
        gpu=device.is_gpu,
    )
    return {part: getattr(found, part) for part in PARTS}


def engine_bytes(engine: Any, ema: Ema | None = None) -> dict[str, int]:
    """The present bytes of this rank by part. A storage counts once, for the first of the parts that it belongs to."""
    seen: set[int] = set()
    parts = {
        "weights": _weights(engine),
        "optimiser": _optimiser(engine),
        "buffers": _buffers(engine),
        "gradients": _gradients(engine),
        "ema": (t for f in (ema.fragments() if ema is not None else ()) for t in f.tensors.values()),
    }
    return {name: _bytes(tensors, seen) for name, tensors in parts.items()}


def _weights(engine: Any) -> Iterator[Tensor]:
    for p in engine.module.parameters():
        yield p.data
        if hasattr(p, "ds_tensor"):  # ZeRO-3: p.data exists only while it is gathered
            yield p.ds_tensor
    if engine.zero_optimization():
        yield from getattr(engine.optimizer, "bit16_groups_flat", ())


def _optimiser(engine: Any) -> Iterator[Tensor]:
    sharded = engine.zero_optimization()
    if sharded:
        yield from list_flat_partitions(engine)
    adam = engine.optimizer.optimizer if sharded else engine.optimizer
    for state in adam.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _gradients(engine: Any) -> Iterator[Tensor]:
    for _, p in list_trained(engine):
        if p.grad is not None:
            yield p.grad
    if engine.zero_optimization():
        optimizer = engine.optimizer
        if (flat := getattr(optimizer, "grad_partitions_flat_buffer", None)) is not None:
            yield flat
        for kept in (optimizer.averaged_gradients, getattr(optimizer, "all_grad_tensors", {})):
            for tensors in kept.values():
                yield from tensors or ()


def _buffers(engine: Any) -> Iterator[Tensor]:
    if engine.zero_optimization():
        for bucket in engine.optimizer.ipg_buckets.values():
            yield from [bucket.buffer] if isinstance(bucket.buffer, Tensor) else bucket.buffer


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
