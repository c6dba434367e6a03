"""Cluster files: the settings of a site, with all mistakes reported at once."""

from pathlib import Path

import pytest

from launch.cluster import Cluster, list_shipped_clusters, load_cluster
from uniemox_dist.core.errors import UserError


def complaint(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_cluster(str(path))
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    said = complaint(
        tmp_path,
        "acount: x\n"
        "gpus_per_node: -1\n"
        "mem: 12 G\n"
        "sbatch: [--time=3]\n"
        "env: {A-B: 1}\n"
        "container: {kind: apptainer}\n"
        "timeouts: {strat_s: 3}\n",
    )
    assert sorted(said) == sorted(
        [
            "acount: unknown key; did you mean account?",
            "gpus_per_node=-1: input should be greater than or equal to 0",
            "mem: '12 G': give a number with K, M, G or T, as 480G, or 0 for all of a node's memory",
            "sbatch: --time is set by the script; use time",
            "env: 'A-B' is not a valid name of a variable; use letters, digits and _",
            "container.kind=apptainer and container.image=None: give both, or neither",
            "timeouts.strat_s: unknown key; did you mean timeouts.start_s?",
        ]
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nodes: 4-2", "nodes=4-2: the first number is the larger one; write 2-4"),
        (
            "gpus_per_node: 0",
            "ranks_per_node: needed with gpus_per_node=0; give the number of CPU ranks on a node",
        ),
        ("time: soon", "time=soon: give minutes, hours:minutes:seconds or days-hours, such as 24:00:00"),
        (
            "{time: 2, signal_lead_s: 120}",
            "signal_lead_s=120 must be shorter than time=2 (120 s)",
        ),
        (
            "sbatch: [--export=NONE]",
            "sbatch: --export is set by the script; leave it out: the script needs its own value",
        ),
        ("sbatch: [-N4]", "sbatch: '-N4' must look like --name or --name=value"),
        ("[1, 2]", "a cluster file is a mapping, found list"),
    ],
)
def test_an_invalid_value_is_refused_with_a_fix(tmp_path: Path, text: str, line: str) -> None:
    assert complaint(tmp_path, text) == [line]


def test_a_text_that_would_break_the_script_is_refused(tmp_path: Path) -> None:
    for key in ("account", "partition", "gpu_type"):
        [line] = complaint(tmp_path, f"{key}: 'a b; rm'")
        assert line == f"{key}: 'a b; rm': must be one word, without spaces, quotes, $ and \\"


def test_an_unknown_site_names_the_shipped_ones() -> None:
    with pytest.raises(UserError, match="--cluster=nowhere: no such file, nor a shipped cluster") as caught:
        load_cluster("nowhere")
    assert str(caught.value).endswith("apptainer, modules, plain, pyxis")


def test_shipped_cluster_files_are_valid() -> None:
    found = {name: load_cluster(name) for name in list_shipped_clusters()}
    assert set(found) == {"apptainer", "modules", "plain", "pyxis"}
    assert (found["modules"].min_nodes, found["modules"].max_nodes, found["modules"].ranks) == (2, 4, 4)
    assert found["modules"].env["PYTHONUNBUFFERED"] == "1"
    assert (found["plain"].ranks, found["plain"].gpus_per_node) == (1, 0)
    assert found["apptainer"].time_s == 48 * 3600


def test_times_and_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("time: 12:30:00\nnodes: 3\nmem: 0\nenv: {A: 1, B: true, C: 1e-3}\n")
    site = load_cluster(str(path))
    assert (site.time_s, site.nodes, site.mem) == (45000, "3", "0")
    assert site.env == {"A": "1", "B": "true", "C": "0.001"}


def test_options_of_a_command_replace_the_files_values_and_are_checked_as_they_are() -> None:
    site = Cluster(nodes="2", ranks_per_node=2, gpus_per_node=0, partition="gpu")
    other = site.with_options({"nodes": "4", "partition": None, "time": "30"})
    assert (other.max_nodes, other.partition, other.time_s, other.ranks) == (4, "gpu", 1800, 2)
    eight = site.with_options({"gpus_per_node": "8", "ranks_per_node": ""})
    assert (eight.gpus_per_node, eight.ranks) == (8, 8)
    with pytest.raises(UserError, match="options: nodes: 'many': give a number, as 4, or a range, as 2-4"):
        site.with_options({"nodes": "many"})


def test_the_guide_explains_every_key() -> None:
    guide = (Path(__file__).parents[3] / "docs/clusters.md").read_text()
    assert [key for key in Cluster.model_fields if f"`{key}`" not in guide] == []
