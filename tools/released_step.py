"""A training step with the schedule of the authors' released code, written from its description in plain torch.

It has an encoder pass and a decoder pass for each view (the person's decoder output is unused), embeds and predicts all
patches, runs the teacher outside no_grad (its weights are frozen, so autograd records nothing there) and its text
tower in every step, and computes relations within the micro-batch. Errors of the released code are corrected at no
extra cost: L3 compares the masked patches, the teacher gets its own normalisation, and the person view is given (no
detector). Pixels are normalised in advance, as by its loader.
Shape legend: B samples, N patches, V visible ones, F decoder width, E embedding width, P values of a patch.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.models import losses
from uniemox_dist.models.patches import normalise, patchify
from uniemox_dist.train.engine import parameter_groups
from uniemox_dist.train.step import StepResult


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Released:
    """The step on a `step_rows.Setting`.

    The student's attention is a plain softmax on a GPU, as in the released code, and the fused kernel on a CPU.
    """

    def __init__(self, setting: Any) -> None:
        self.student, self.clip = copy.deepcopy(setting.student).to(device()), setting.clip
        self.model, self.loss = setting.config.model, setting.config.loss
        assert self.student.encoder.reg_token is None, "the released code has no register tokens"
        self.bf16 = setting.precision == "bf16"
        optim = setting.config.optim
        # Our optimizer on a CPU; torch's default on a GPU, as in the released code.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.student, optim.weight_decay),
            lr=0.0,
            betas=optim.betas,
            fused=True if device().type == "cpu" else None,
        )
        teacher, batch = setting.teacher, setting.batch
        self.tokenize, self.captions = teacher.tokenizer, setting.captions
        views = (batch.scene_B3HW, batch.person_B3HW)
        self.scene_B3HW, self.person_B3HW = (
            normalise(view, self.model.mean, self.model.std, torch.float32) for view in views
        )
        pixels = normalise(batch.scene_B3HW, teacher.mean, teacher.std, torch.float32)
        if pixels.shape[-1] != teacher.size:
            pixels = F.interpolate(pixels, (teacher.size, teacher.size), mode="bicubic", antialias=True)
        self.teacher_pixels_B3HW = pixels
        if device().type == "cuda":
            for block in [*self.student.encoder.blocks, *self.student.decoder.blocks]:
                block.attn.fused_attn = False

    def step(self) -> StepResult:
        B, N = len(self.captions), self.model.patches
        orders = [torch.rand(B, N, device=device()).argsort(dim=1) for _ in range(2)]
        total, parts = self.losses(*orders)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, relation, similarity, reconstruction = torch.cat([total.detach().view(1), parts]).tolist()
        named = {"relation": relation, "similarity": similarity, "reconstruction": reconstruction}
        return StepResult(loss, named, 0.0, True, stop=False, damaged=0, samples=B)

    def losses(self, scene_order_BN: Tensor, person_order_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses, and (relation, similarity, reconstruction)."""
        tokens = self.tokenize(self.captions).to(device())
        texts_BE = F.normalize(self.clip.encode_text(tokens).float(), dim=1)
        with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
            predicted_BNP, alpha_BF = self.autoencode(self.scene_B3HW, scene_order_BN)
            _, beta_BF = self.autoencode(self.person_B3HW, person_order_BN)
            fused_BE = self.student.fusion(alpha_BF, beta_BF)
            pictures_BE = F.normalize(self.clip.encode_image(self.teacher_pixels_B3HW), dim=1)
        target_BNP = losses.reconstruction_targets(
            patchify(self.scene_B3HW, self.model.patch_size), norm_pix=self.loss.norm_pix
        )
        per_patch_BN = (predicted_BNP.float() - target_BNP).square().mean(dim=-1)
        mask_BN = torch.ones_like(per_patch_BN).scatter(1, scene_order_BN[:, : self.model.visible], 0.0)
        parts = (
            losses.relation_loss(fused_BE, pictures_BE, texts_BE),
            losses.similarity_loss(fused_BE, pictures_BE),
            (per_patch_BN * mask_BN).sum() / mask_BN.sum(),
        )
        return parts[0] + parts[1] + parts[2], torch.stack(parts).detach()

    def autoencode(self, pixels_B3HW: Tensor, order_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Runs MAE on one view: returns predictions of all patches B×N×P, and the class token at width F."""
        encoder, decoder, V = self.student.encoder, self.student.decoder, self.model.visible
        proj = encoder.patch_embed.proj
        x = F.conv2d(pixels_B3HW, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2)
        x = x + encoder.pos_embed[:, 1:]
        x = x.gather(1, order_BN[:, :V, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        x = self.student.to_decoder(encoder.norm(encoder.blocks(encoder.norm_pre(x))))
        cls_BF = x[:, 0]
        hidden = decoder.mask_token.expand(len(x), order_BN.shape[1] - V, -1)
        all_BNF = torch.cat([x[:, 1:], hidden.to(x.dtype)], dim=1)
        all_BNF = all_BNF.gather(1, order_BN.argsort(dim=1)[:, :, None].expand(-1, -1, all_BNF.shape[2]))
        x = torch.cat([x[:, :1], all_BNF], dim=1) + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        return decoder.prediction(decoder.norm(x))[:, 1:], cls_BF
