"""The protocol gives the numbers of the single tasks, streams pictures, and words its verdict by paired intervals."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import make_taught_release

from uniemox_dist.cli.main import run
from uniemox_dist.evaluate import embedding_pass, protocol
from uniemox_dist.evaluate.protocol import Metric, summarise
from uniemox_dist.evaluate.subject import ReleaseSubject

ROWS = {
    "student": "release",
    "untrained": "untrained",
    "teacher": "teacher",
    "colour histogram": "histogram",
    "24x24 pixels": "pixels",
    "most common label": "most common label",
}


@pytest.fixture(scope="module")
def taught_release(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    return make_taught_release(tmp_path_factory.mktemp("taught"), tiny_teacher)


def evaluated(task: str, release: Path, data: Path, out: Path, *more: str) -> dict[str, Any]:
    assert run(["evaluate", task, str(release), str(data), "--json", str(out), *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def table(taught_release: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluated("protocol", taught_release, tiny_data, tmp_path_factory.mktemp("protocol") / "e.json")


def rows_of(table: dict[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    rows = next(found["rows"] for found in table["metrics"] if found["name"] == metric)
    return {row["row"]: row for row in rows}


def test_protocol_and_probe_give_the_same_numbers(
    table: dict[str, Any], taught_release: Path, tiny_data: Path, tmp_path: Path
) -> None:
    baselines = ["--baselines", "untrained,teacher,histogram,pixels", "--device", "cpu"]
    probe = evaluated("probe", taught_release, tiny_data, tmp_path / "probe.json", *baselines)["rows"]
    found = rows_of(table, "linear_probe")
    assert set(found) == set(ROWS)
    for row, name in ROWS.items():
        expected = [round(probe[name][key], 5) for key in ("accuracy", "low", "high")]
        assert [found[row][key] for key in ("value", "low", "high")] == expected
        assert found[row].get("penalty") == probe[name].get("penalty")


def test_protocol_and_retrieval_give_the_same_numbers(
    table: dict[str, Any], taught_release: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options = ["--baselines", "untrained,teacher", "--device", "cpu"]
    retrieval = evaluated("retrieval", taught_release, tiny_data, tmp_path / "r.json", *options)["rows"]
    found = rows_of(table, "retrieval_r10")
    for row in ("student", "untrained", "teacher"):
        expected = retrieval[ROWS[row]]["image_to_text"]["R@10"]
        assert [found[row][key] for key in ("value", "low", "high")] == [
            round(expected[key], 5) for key in ("value", "low", "high")
        ]


def test_pictures_are_streamed_and_worker_processes_change_nothing(
    table: dict[str, Any],
    taught_release: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    most_alive = 0
    embed = ReleaseSubject.embed

    def watched(subject: ReleaseSubject, batch: Any, **wanted: bool) -> Any:
        nonlocal most_alive
        seen.append(weakref.ref(batch.scene_B3HW))
        most_alive = max(most_alive, sum(ref() is not None for ref in seen))
        return embed(subject, batch, **wanted)

    monkeypatch.setattr(ReleaseSubject, "embed", watched)
    monkeypatch.setattr(embedding_pass, "BATCH", 4)
    again = evaluated(
        "protocol", taught_release, tiny_data, tmp_path / "e.json", "--workers", "1", "--device", "cpu"
    )
    assert len(seen) == 15 + 5
    assert most_alive <= 2  # the batch that is embedded, and the one before it
    for metric, other in zip(table["metrics"], again["metrics"]):
        for row, same in zip(metric["rows"], other["rows"]):
            assert row["row"] == same["row"]
            # Other batches round otherwise.
            assert row["value"] == pytest.approx(same["value"], abs=2e-5)


def test_the_verdict_lists_wins_ties_and_losses() -> None:
    noise = np.random.RandomState(0).randn(60) / 20
    rows = {"student": 0.5 + noise, "a": 0.2 + noise, "b": 0.5 - noise, "c": 0.9 + noise, "d": 0.1 + noise}
    clusters = [str(i) for i in range(60)]
    hits = Metric("hits", "Hits", "higher", False, "", rows, clusters)
    error = Metric("error", "Error", "lower", True, "", {"student": noise, "a": 1 + noise}, clusters)
    assert summarise([hits, error])["verdict"] == [
        "Hits (secondary): the student is better than a and d; statistically tied with b; worse than c.",
        "Error: the student is better than a.",
        "The student does not beat every row in Hits (secondary).",
    ]
    assert summarise([error])["verdict"][-1] == "The student beats every row in every metric."


def test_a_statistic_other_than_a_mean_has_an_interval_and_a_verdict() -> None:
    truth = np.linspace(0, 1, 40)
    noise = np.random.RandomState(0).randn(40)
    metric = Metric(
        "valence",
        "Valence",
        "higher",
        False,
        "",
        {"student": truth + noise / 50, "noise": noise},
        [str(i) for i in range(40)],
        lambda scores, drawn: protocol.pearson(scores[drawn], truth[drawn]),
    )
    found = summarise([metric])
    student, _ = found["metrics"][0]["rows"]
    assert student["low"] <= student["value"] <= student["high"] <= 1
    assert student["low"] > 0.98
    assert found["verdict"][0] == "Valence (secondary): the student is better than noise."
