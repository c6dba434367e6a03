"""Batch scripts: what is rendered for each shipped site, and that slurm/ holds the plain ones.

After a wanted change of a template: `python tests/unit/launch/test_render.py` rewrites all of them.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import Cluster, list_shipped_clusters, load_cluster
from launch.render import SCRIPTS, Job, quote_word, render, write_scripts
from uniemox_dist.core.errors import UserError

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "golden"
FROZEN = Job(
    name="vit-l",
    run="/shared/runs/vit-l",
    site="site",
    folder="/home/ann/my work",
    code="/shared/runs/vit-l/code/0123456789ab",
    output="/shared/runs/vit-l/logs/slurm-%j.out",
    uniemox="/opt/venv/bin/uniemox",
    config="/shared/runs/vit-l/jobs/0001/config.yaml",
)
SWEEP = Job(
    **{
        **FROZEN.__dict__,
        "run": "/shared/runs/sweeps/vit-l-0001",
        "config": "",
        "output": "/shared/runs/sweeps/vit-l-0001/slurm-%A_%a.out",
        "points": 6,
        "tasks": "/shared/runs/sweeps/vit-l-0001/tasks.tsv",
    }
)


def golden(site: str) -> str:
    return render("pretrain", load_cluster(site), FROZEN, ("/shared/runs", "/data/with space"))


def texts() -> dict[Path, str]:
    """All rendered texts that are kept, by their files."""
    plain = load_cluster("plain")
    return {
        **{ROOT / "slurm" / f"{name}.sbatch": render(name, plain) for name in SCRIPTS},
        **{GOLDEN / f"{site}.sbatch": golden(site) for site in list_shipped_clusters()},
        GOLDEN / "sweep.sbatch": render("pretrain", plain, SWEEP),
    }


@pytest.mark.parametrize("path", sorted(texts()), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_equals_its_rendered_template_and_is_valid_shell(path: Path) -> None:
    assert path.read_text() == texts()[path], f"wanted? then: python {Path(__file__).relative_to(ROOT)}"
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", "--exclude=SC1090,SC1091", str(path)], check=True)


def test_a_range_of_nodes_is_not_held_down_by_its_tasks() -> None:
    # Slurm gives no more nodes than the fewest have tasks, and a new job in a failed one's place may have fewer, too.
    one = render("pretrain", Cluster(nodes="2-4", gpus_per_node=1), FROZEN)
    assert "\n#SBATCH --nodes=2-4\n" in one
    assert "#SBATCH --ntasks-per-node" not in one
    assert '--nodes="$SLURM_JOB_NUM_NODES"' not in one
    assert "#SBATCH --ntasks-per-node=8\n" in render(
        "pretrain", Cluster(nodes="2-4", gpus_per_node=8), FROZEN
    )


def test_every_script_in_slurm_has_its_template() -> None:
    assert {p.name for p in (ROOT / "slurm").iterdir()} == {f"{name}.sbatch" for name in SCRIPTS}


def test_scripts_are_written_for_a_site_and_nothing_is_overwritten(tmp_path: Path) -> None:
    written = write_scripts(tmp_path / "x", "pyxis")
    assert [path.name for path in written] == [f"{name}.sbatch" for name in SCRIPTS]
    assert "#SBATCH --account=my_project" in (tmp_path / "x/evaluate.sbatch").read_text()
    write_scripts(tmp_path / "x", "pyxis")
    (tmp_path / "x/pack.sbatch").write_text("mine")
    with pytest.raises(UserError, match=r"pack.sbatch exists and differs"):
        write_scripts(tmp_path / "x", "pyxis")
    assert (tmp_path / "x/pack.sbatch").read_text() == "mine"


def words_of(script: str, name: str, tmp_path: Path) -> list[str]:
    """The words of an array or a variable that a script sets before its work begins, as bash reads them."""
    head = script[: script.index("# The seconds of --signal above")]
    show = f'{head}\nprintf "%s\\n" "${{{name}[@]}}"\n'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True, cwd=tmp_path)
    return done.stdout.splitlines()


def test_texts_from_files_and_names_reach_the_job_as_they_are(tmp_path: Path) -> None:
    strange = 'it\'s $HOME; `rm` "x"'
    site = Cluster(env={"A": strange}, uniemox="/opt/uniemox")
    job = Job(**{**FROZEN.__dict__, "config": f"/x/{strange}/config.yaml", "code": "/c o/d'e"})
    script = render("pretrain", site, job)
    assert words_of(script, "A", tmp_path) == [strange]
    assert words_of(script.replace("set -- ", "arguments="), "arguments", tmp_path) == [job.config]
    assert words_of(script, "PYTHONPATH", tmp_path)[0].split(":")[0] == "/c o/d'e"


def test_containers_see_the_runs_and_the_data(tmp_path: Path) -> None:
    inside = words_of(golden("apptainer").replace("module", ": "), "inside", tmp_path)
    assert inside[:3] == ["apptainer", "exec", "--nv"]
    assert [inside[i + 1] for i, part in enumerate(inside) if part == "--bind"] == [
        str(tmp_path),
        "/shared/models",
        "/shared/runs",
        "/data/with space",
    ]
    pyxis = words_of(golden("pyxis"), "inside", tmp_path)
    [mounts] = [part.partition("=")[2] for part in pyxis if part.startswith("--container-mounts")]
    assert mounts.split(",")[1:] == [
        "/shared/models:/shared/models",
        "/shared/runs:/shared/runs",
        "/data/with space:/data/with space",
    ]


def test_a_site_without_requeue_gets_a_script_without_it() -> None:
    for site, requeues in (("plain", True), ("pyxis", False)):
        script = golden(site)
        assert ("scontrol requeue" in script) == requeues
        assert (("#SBATCH --requeue\n" in script), ("#SBATCH --no-requeue\n" in script)) == (
            requeues,
            not requeues,
        )


def test_words_are_quoted_only_if_necessary() -> None:
    assert [quote_word(x) for x in ("a/b-c_1", "%x-%j.out", "a b", "")] == [
        "a/b-c_1",
        "%x-%j.out",
        "'a b'",
        "''",
    ]


if __name__ == "__main__":
    for target, text in texts().items():
        target.write_text(text)
        print(f"written: {target.relative_to(ROOT)}", file=sys.stderr)
