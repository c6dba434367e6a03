"""Settings of the student and the teacher."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from uniemox_dist.config.encoder_names import fill_in
from uniemox_dist.config.sections import Rgb, Section, Share


class ModelConfig(Section):
    """The student: encoder, decoder, fusion and the masks that it sees."""

    name: str | None = None
    """Name of a timm vision transformer, or vit_tiny, vit_small, vit_base, vit_large or vit_huge. It sets width,
    depth, heads and mlp_ratio, and patch_size and image_size unless they are given."""
    init_from: str | None = None
    """Weights to start from: a file in MAE's or timm's layout, a release, or a run's checkpoint. Not read on resume."""
    positions: Literal["fixed", "learned"] = "fixed"
    """Positions of the encoder: fixed 2-D sine-cosine (or those of init_from), or trained from there."""
    image_size: PositiveInt = 224
    """Side of both views, pixels."""
    patch_size: PositiveInt = 16
    """Side of a patch, pixels."""
    width: PositiveInt = 768
    """Encoder width D."""
    depth: PositiveInt = 12
    """Encoder blocks."""
    heads: PositiveInt = 12
    """Encoder attention heads."""
    mlp_ratio: PositiveFloat = 4.0
    """Hidden width of the blocks' MLPs over their width."""
    decoder_width: PositiveInt = 512
    """Decoder and fusion width F."""
    decoder_depth: PositiveInt = 8
    """Decoder blocks."""
    decoder_heads: PositiveInt = 16
    """Decoder attention heads."""
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest probability that a block of the encoder is skipped for a sample; grows linearly with depth from 0."""
    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Fraction of patches removed from each view."""
    mask: Literal["random", "block", "person"] = "random"
    """Which patches are removed: any, rectangles, or (in the scene) a share of them on the person."""
    mask_person_share: Share = 0.5
    """With mask=person: share of the removed patches that are on the person, if the person has enough patches."""
    fusion: Literal["prior", "multi_head", "attention", "gated_mlp", "none"] = "prior"
    """How scene and person are joined: the psychological prior, one of the released code's other ways, or the scene
    alone (no person branch)."""
    fusion_heads: PositiveInt = 8
    """Heads of the fusions multi_head, attention and gated_mlp."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Pixel mean of the student's input, 0..1 (ImageNet's)."""
    std: Rgb = (0.229, 0.224, 0.225)
    """Pixel standard deviation of the student's input, 0..1 (ImageNet's)."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return fill_in(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        if self.image_size % self.patch_size:
            down = max(1, self.image_size // self.patch_size) * self.patch_size
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of "
                f"model.patch_size={self.patch_size}; try {down} or {down + self.patch_size}"
            )
        for width, heads, name in (
            (self.width, self.heads, ""),
            (self.decoder_width, self.decoder_heads, "decoder_"),
        ):
            if width % heads or width % 4:
                raise ValueError(
                    f"model.{name}width={width} must be a multiple of 4 and of model.{name}heads={heads}"
                )
        if self.fusion in ("multi_head", "attention", "gated_mlp") and self.decoder_width % self.fusion_heads:
            raise ValueError(
                f"model.fusion_heads={self.fusion_heads} does not divide model.decoder_width={self.decoder_width}"
            )
        if not 0 < self.visible < self.patches:
            raise ValueError(
                f"model.mask_ratio={self.mask_ratio} leaves {self.visible} of {self.patches} patches visible"
            )
        return self

    @property
    def patches(self) -> int:
        """Number of patches N of a view."""
        return self.patch_grid**2

    @property
    def patch_grid(self) -> int:
        """Number of patches along a side of a view."""
        return self.image_size // self.patch_size

    @property
    def patch_values(self) -> int:
        """Number of values P of a patch: three colours of patch_size² pixels."""
        return 3 * self.patch_size**2

    @property
    def visible(self) -> int:
        """Number of visible patches V of a view."""
        return int(self.patches * (1 - self.mask_ratio) + 0.5)


class TeacherConfig(Section):
    """The frozen CLIP whose picture-text similarities are learned."""

    name: str = "ViT-B-16-quickgelu"
    """`local-dir:PATH`, `shipped:demo`, or an open_clip model name together with weights, mean and std."""
    weights: str | None = None
    """File of weights for an open_clip model name."""
    mean: Rgb | None = None
    """Pixel mean of the teacher's input; required with weights, otherwise read from the local-dir."""
    std: Rgb | None = None
    """Pixel standard deviation of the teacher's input; as mean."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the picture tower; auto is bf16 on a GPU and fp32 elsewhere."""
    text_batch: PositiveInt = 256
    """Captions embedded at once when the text cache is built."""
    source: Literal["live", "cache"] = "live"
    """live: run the picture tower in every step. cache: replay views and embeddings that `uniemox teach --views`
    stored."""
    compile: bool = False
    """Compile the picture tower with torch.compile."""
