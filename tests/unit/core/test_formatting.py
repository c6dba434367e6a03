"""Text of lists, sizes and counts."""

from uniemox_dist.core.formatting import counted, cut, short, size


def test_foreign_texts_cannot_control_or_flood_a_terminal() -> None:
    assert cut("a\x1b[2J\tb\x07") == "a [2J b "
    assert cut("x" * 300) == "x" * 240 + " …"
    assert short([f"step_{i}" for i in range(10)]) == "step_0, step_1 … 8 more"


def test_sizes_and_counts() -> None:
    assert [size(n) for n in (12, 1200, 37_900_000, 1.34e9, 5e12)] == [
        "12 bytes",
        "1.2 kB",
        "37.9 MB",
        "1.3 GB",
        "5.0 TB",
    ]
    assert (counted(1, "rank"), counted(1234, "file")) == ("1 rank", "1,234 files")
