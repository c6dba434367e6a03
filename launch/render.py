"""Renders batch scripts from templates: for a site, and for one submission."""

import re
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2

from launch.cluster import Cluster, load_cluster
from uniemox_dist.core.errors import UserError

SCRIPTS = ("pretrain", "finetune", "pack", "evaluate", "release")
_PLAIN = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """The values that the script of one submission contains; all paths are absolute."""

    name: str
    """The name of the job."""
    run: str
    """The run's folder, or the submission's."""
    site: str
    folder: str
    """The working directory of the command: relative paths of the configuration start there."""
    code: str
    """Folder of the frozen packages."""
    output: str
    """The main log, with Slurm's % signs."""
    uniemox: str
    """The command that submits."""
    config: str = ""
    """The resolved configuration of a run."""
    points: int = 0
    """Runs of a sweep; 0 for one run."""
    tasks: str = ""
    """File with a line for each run of a sweep: its configuration and its folder, with a tab between."""
    words: tuple[str, ...] = ()
    """The command line after `uniemox`, of commands that do not train."""
    parallel: bool = False
    """Whether several ranks share the work of such a command."""


def render(script: str, cluster: Cluster, job: Job | None = None, mounts: tuple[str, ...] = ()) -> str:
    """The text of a batch script: one of SCRIPTS for a site, or that of a submitted job.

    Args:
        script: the script's name, or the command's.
        mounts: folders that a container needs besides the site's.
    """
    training = script in ("pretrain", "finetune")
    name = "training" if training else "command" if job is not None else script
    template = _environment().get_template(f"{name}.sbatch.j2")
    return template.render(what=script, c=cluster, job=job, mounts=(*cluster.container.mounts, *mounts))


def write_scripts(folder: Path, site: str) -> list[Path]:
    """Writes all scripts for a site, to be submitted with sbatch; returns their paths.

    Raises:
        UserError: if one exists with another text, or cannot be written.
    """
    cluster = load_cluster(site)
    texts = {folder / f"{name}.sbatch": render(name, cluster) for name in SCRIPTS}
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"DIR={folder}: {path.name} exists and differs; delete it, or give another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"DIR={folder}: cannot be written ({error.strerror}); give another folder") from None
    return list(texts)


def quote_word(text: object) -> str:
    """A text as one word of a shell or of an #SBATCH line, quoted if necessary."""
    text = str(text)
    return text if _PLAIN.fullmatch(text) else shlex.quote(text)


def _environment() -> jinja2.Environment:
    templates = resources.files("launch") / "templates"
    sources = {path.name: path.read_text(encoding="utf-8") for path in templates.iterdir()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["word"] = quote_word
    return environment
