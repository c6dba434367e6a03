"""Rows over several seeds, and the table and reading that an ablation makes of them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from uniemox_dist.evaluate.intervals import Bootstrap

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from ablation_table import write_table

ALL, NONE = "all losses", "without L3 (reconstruction)"


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    row = Bootstrap(["a", "a", "b"]).row(np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]))
    assert (row.mean, row.by_seed) == (3.0, (2.0, 4.0))
    assert row.spread == pytest.approx(np.sqrt(2))
    assert Bootstrap(["a", "b"]).row(np.array([[1.0, 2.0]])).spread == 0


def test_the_interval_of_one_seed_is_that_of_the_bootstrap_over_clusters() -> None:
    random = np.random.RandomState(3)
    clusters = [f"c{i}" for i in random.randint(0, 40, 300)]
    scores = random.rand(300) + np.array([int(c[1:]) % 7 for c in clusters]) / 7
    bootstrap = Bootstrap(clusters)
    row = bootstrap.row(scores[None])
    assert (row.low, row.high) == pytest.approx(bootstrap.mean(scores))
    by_samples = bootstrap.statistic(lambda drawn: float(scores[drawn].mean()))
    assert (row.low, row.high) == pytest.approx(by_samples)


def test_seeds_that_disagree_widen_the_interval_and_paired_differences_cancel_what_they_share() -> None:
    random = np.random.RandomState(0)
    clusters = [str(i) for i in range(200)]
    noise, pool = random.rand(200), Bootstrap(clusters)
    alike = pool.row(np.stack([noise, noise, noise]))
    apart = pool.row(np.stack([noise - 0.3, noise, noise + 0.3]))
    assert alike.mean == pytest.approx(apart.mean)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    a = np.stack([noise - 0.3, noise, noise + 0.3])
    gain = pool.difference(a + 0.01, a)
    assert (gain.low, gain.high) == (pytest.approx(0.01), pytest.approx(0.01))


def metrics(student: float, *, decoder: bool = True) -> list[dict[str, Any]]:
    """Scores of one run on 40 pictures: around `student`, beside a trivial row of 0.5."""
    noise = np.random.RandomState(1).randn(40) / 100
    about = {"primary": True, "note": "", "clusters": [str(i) for i in range(40)]}
    rows = {
        "student": student + noise,
        "untrained": 0.1 + noise,
        "histogram": 0.5 + noise,
        "chance": 0 * noise,
    }
    hits = {"name": "hits", "title": "Hits", "better": "higher", **about}
    error = {"name": "error", "title": "Error", "better": "lower", **about}
    found = [(hits, rows), (error, {"student": 1 - student + noise, "line": 0.9 + noise})][: 1 + decoder]
    return [{**m, "rows": {row: list(map(float, v)) for row, v in r.items()}} for m, r in found]


def test_the_table_states_which_rows_the_student_beats(tmp_path: Path) -> None:
    found = {
        ALL: [metrics(0.3), metrics(0.32)],
        NONE: [metrics(0.4, decoder=False), metrics(0.42, decoder=False)],
        "the same": [metrics(0.3), metrics(0.32)],
    }
    about = {"seeds": [0, 1], "epochs": 1.0}
    text = write_table(found, ("hits", "error", "missing"), about, tmp_path)
    result = json.loads((tmp_path / "table.json").read_text())
    hits, error = result["metrics"]
    assert [row["row"] for row in hits["rows"]] == [ALL, NONE, "the same", "untrained", "histogram", "chance"]
    assert [row["row"] for row in error["rows"]] == [ALL, "the same", "line"]
    assert hits["rows"][1]["minus_first"]["mean"] == pytest.approx(0.1)
    assert hits["rows"][0]["by_seed"] == pytest.approx([0.3, 0.32], abs=0.01)
    assert result["reading"] == [
        f"Hits: all losses: statistically tied with the same; worse than {NONE}.",
        "Hits: all losses: better than untrained, chance; worse than histogram.",
        "Error: all losses: statistically tied with the same.",
        "Error: all losses: better than line.",
    ]
    assert (tmp_path / "table.md").read_text() == text
    assert f"| {NONE} | **+0.100** [+0.100, +0.100] | – |" in text
    assert Image.open(tmp_path / "table.png").width > 1000
