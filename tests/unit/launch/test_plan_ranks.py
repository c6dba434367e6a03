"""Legal numbers of ranks, computed by hand."""

import pytest

from launch.plan.ranks import (
    divisors,
    explain_illegal,
    largest_legal,
    legal_ranks,
    micro_batches,
    nearest_legal,
)
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError


def config(
    global_batch: int = 768, micro_batch: int = 32, streams: int = 96, recipe: str = "uniemox_vit_b16"
) -> Config:
    pairs = [
        f"batch.global_batch={global_batch}",
        f"batch.micro_batch={micro_batch}",
        f"batch.streams={streams}",
    ]
    return load_config(recipe, pairs)


def test_divisors_and_legal_numbers() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    # 768 samples in micro-batches of 32 are 24 for all ranks together.
    assert legal_ranks(config()) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert micro_batches(config(), 24) == [1, 2, 4, 8, 16, 32]
    assert nearest_legal(config(), 20) == (12, 24)
    assert nearest_legal(config(), 30) == (24, None)
    assert nearest_legal(config(), 8) == (8, 8)


@pytest.mark.parametrize(
    ("have", "used"),
    [
        ((1, 8), (1, 8)),
        ((2, 8), (2, 6)),  # 12 of 16: 16 is illegal with micro-batches of 32
        ((3, 8), (3, 8)),
        ((4, 8), (3, 8)),  # 24, as 4 x 6 would be: three full nodes, one idle
        ((5, 4), (3, 4)),
        ((7, 1), (6, 1)),
        ((1, 5), (1, 4)),
        ((64, 8), (3, 8)),
    ],
)
def test_the_most_ranks_run_on_the_fewest_nodes(have: tuple[int, int], used: tuple[int, int]) -> None:
    assert largest_legal(config(768, 32, 96), *have) == used


def test_why_a_number_is_illegal_names_numbers_that_are_not() -> None:
    batch = config()
    assert explain_illegal(batch, 8) is None
    assert explain_illegal(batch, 7) == (
        "batch.streams=96 is not a multiple of 7 ranks; use 6 or 8 ranks, or set batch.streams=98 "
        "batch.global_batch=1568"
    )
    assert explain_illegal(batch, 16) == (
        "batch.micro_batch=32 does not divide a rank's 48 samples of a step (batch.global_batch=768 over 16 ranks); "
        "set batch.micro_batch=24"
    )
    assert explain_illegal(batch, 128) == (
        "128 ranks are more than batch.streams=96, and each needs a stream of its own; use at most 24 ranks, or set "
        "batch.streams=128 batch.global_batch=4096"
    )


@pytest.mark.parametrize("ranks", [5, 7, 11, 20, 100, 128, 4096])
def test_proposed_numbers_of_ranks_are_legal(ranks: int) -> None:
    text = explain_illegal(config(micro_batch=24), ranks)
    assert text is not None
    values = {pair.split("=")[0]: int(pair.split("=")[1]) for pair in text.split("set ")[1].split()}
    proposed = config(values["batch.global_batch"], 24, values["batch.streams"])
    assert explain_illegal(proposed, ranks) is None


def test_a_micro_batch_that_fits_no_number_of_ranks() -> None:
    assert legal_ranks(config(micro_batch=7)) == []
    with pytest.raises(
        UserError, match=r"micro_batch=7 does not divide batch\.global_batch=768.*micro_batch=6"
    ):
        largest_legal(config(768, 7, 96), 2, 8)
    with pytest.raises(UserError, match="0 nodes with 8 ranks each: needs at least one"):
        largest_legal(config(768, 32, 96), 0, 8)


@pytest.mark.parametrize("ranks", [2, 3, 5, 24, 32, 128])
def test_fine_tuning_that_mixes_pairs_needs_an_even_number_of_streams_a_rank(ranks: int) -> None:
    mixing = config(96, 2, 96, "finetune")
    assert (96 // ranks) % 2 == 0 or explain_illegal(mixing, ranks)
    assert legal_ranks(mixing) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert legal_ranks(config(96, 2, 96, "finetune_emotic")) == legal_ranks(
        mixing
    )  # 96 ranks have one sample each
    assert largest_legal(config(768, 8, 96, "finetune"), 4, 8) == (3, 8)
    assert largest_legal(config(768, 8, 96, "finetune_emotic"), 4, 8) == (4, 8)
    assert explain_illegal(config(768, 8, 96, "finetune"), 32) == (
        "finetune.mixup and finetune.cutmix mix neighbouring slots: batch.streams=96 over 32 ranks are 3 each, which "
        "is odd; use 24 or 48 ranks, or set batch.streams=128 batch.global_batch=768"
    )
    assert micro_batches(mixing, 8) == [2, 4, 6, 12]
