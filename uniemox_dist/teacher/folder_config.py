"""The settings that a teacher's folder may pass on to open_clip.

A folder comes from elsewhere, and open_clip hands some of its settings on to other libraries: `tokenizer_kwargs` to
transformers, where `trust_remote_code` runs Python files of the folder, and names of models to timm and transformers,
which download them. So only settings that open_clip's own models have are allowed, with values of bounded size.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import cut

MAX_BYTES = 1 << 20
"""Largest size of the file."""
Size = Annotated[int, Field(ge=1, le=1 << 16)]
"""Widths, heads, layers, lengths and sides of pictures."""
Sizes = Size | Annotated[list[Size], Field(min_length=1, max_length=4)]
Number = Annotated[float, Field(ge=-1e6, le=1e6)]
Word = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9_]*$")]
TimmName = Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?$")]
"""An architecture of timm, without its schemes (`hf-hub:`, `local-dir:`), which load files."""
TextTower = Literal[
    "facebook/nllb-200-distilled-1.3B",
    "facebook/nllb-200-distilled-600M",
    "google/mt5-base",
    "google/mt5-xl",
    "roberta-base",
    "xlm-roberta-base",
    "xlm-roberta-large",
]
"""The text towers of transformers that open_clip's own models have."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Norm(_Settings):
    eps: Annotated[float, Field(gt=0, lt=1)] | None = None


class _Activation(_Settings):
    approximate: Literal["tanh", "none"] | None = None


class _Tokenizer(_Settings):
    clean: Word | None = None
    strip_sep_token: bool | None = None
    language: Word | None = None


class _Tower(_Settings):
    width: Size | None = None
    layers: Sizes | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    ls_init_value: Number | None = None
    pool_type: Word | None = None
    output_tokens: bool | None = None
    act_kwargs: _Activation | None = None
    norm_kwargs: _Norm | None = None
    block_type: Word | None = None
    qk_norm: bool | None = None
    scaled_cosine_attn: bool | None = None
    scale_heads: bool | None = None
    scale_attn_inner: bool | None = None
    scale_attn: bool | None = None
    scale_fc: bool | None = None


class _Vision(_Tower):
    head_width: Size | None = None
    patch_size: Sizes | None = None
    image_size: Sizes | None = None
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    attentional_pool: bool | Word | None = None
    attn_pooler_queries: Size | None = None
    attn_pooler_heads: Size | None = None
    no_ln_pre: bool | None = None
    pos_embed_type: Word | None = None
    final_ln_after_pool: bool | None = None
    timm_model_name: TimmName | None = None
    timm_model_pretrained: Literal[False] | None = None
    timm_pool: Word | None = None
    timm_proj: Word | None = None
    timm_proj_bias: bool | None = None
    timm_drop: Number | None = None
    timm_drop_path: Number | None = None


class _Text(_Tower):
    context_length: Size | None = None
    vocab_size: Annotated[int, Field(ge=1, le=1 << 22)] | None = None
    heads: Size | None = None
    hf_tokenizer_name: Annotated[str, StringConstraints(max_length=128)] | None = None
    """Only says that the folder has a tokenizer of transformers; open_clip then reads that of the folder."""
    tokenizer_mode: Word | None = None
    tokenizer_kwargs: _Tokenizer | None = None
    hf_model_name: TextTower | None = None
    hf_model_pretrained: Literal[False] | None = None
    hf_proj_type: Word | None = None
    hf_pooler_type: Word | None = None
    embed_cls: bool | None = None
    pad_id: Annotated[int, Field(ge=0, le=1 << 22)] | None = None
    eos_id: Annotated[int, Field(ge=0, le=1 << 22)] | None = None
    no_causal_mask: bool | None = None
    final_ln_after_pool: bool | None = None
    proj_type: Word | None = None
    proj_bias: bool | None = None


class _Multimodal(_Text):
    dim_head: Size | None = None
    n_queries: Size | None = None
    attn_pooler_heads: Size | None = None


class _Model(_Settings):
    embed_dim: Annotated[int, Field(ge=0, le=1 << 16)]
    vision_cfg: _Vision
    text_cfg: _Text
    multimodal_cfg: _Multimodal | None = None
    quick_gelu: bool | None = None
    custom_text: bool | None = None
    init_logit_scale: Number | None = None
    init_logit_bias: Number | None = None


def check_model_config(path: Path, source: str) -> bool:
    """Checks the `model_cfg` of a teacher's folder; returns whether the folder has a tokenizer of transformers.

    Args:
        path: the configuration file of the folder.
        source: the setting that names the folder, for error messages.

    Raises:
        UserError: naming the first setting that is not allowed, and its value.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        content = json.loads(text)
        model = content["model_cfg"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        lacks = isinstance(error, KeyError | TypeError)
        why = "states no model_cfg" if lacks else f"cannot be read ({cut(str(error))})"
        raise UserError(f"{source}: {path.name} {why}; copy the teacher again") from None
    try:
        settings = _Model.model_validate(model)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = cut(json.dumps(".".join(["model_cfg", *map(str, problem["loc"])]))[1:-1], 120)
        if problem["type"] == "missing":
            raise UserError(f"{source}: {path.name} states no {name}; copy the teacher again") from None
        value = cut(json.dumps(problem["input"], ensure_ascii=True), 60)
        raise UserError(
            f"{source}: {path.name}: {name}={value} is not a setting that a teacher's folder may have, because other "
            "libraries would act on it; remove it, or use a model without it"
        ) from None
    return bool(settings.text_cfg.hf_tokenizer_name)
