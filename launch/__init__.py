"""Recipes, and ways to submit commands: on this machine, and on clusters. Torch-free."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit import Job

    from launch.cluster import Cluster
    from uniemox_dist.config.schema import Config


def submit(
    run: "str | Config | Sequence[str]", cluster: "str | Cluster", *overrides: str, **options: Any
) -> "Job[int]":
    """Submits a command through submitit. The job's result is the exit code 0; any other end is an error of the job.

    Args:
        run: a recipe's path or name, or a configuration, of pretraining or fine-tuning; or the words of any other
            command, such as ["evaluate", "probe", "RELEASE", "DATA"].
        cluster: a cluster file's path or name, or the cluster as a value.
        overrides: KEY=VALUE pairs on top of a recipe.
        options: fields of `launch.dispatch.Request`, such as resume=True; and max_timeouts, the number of time
            limits that the job may reach.

    Raises:
        UserError: with one line for each reason why the job would fail; then nothing was submitted.
    """
    from launch import dispatch
    from launch.backends.submitit import Submitit
    from launch.cluster import load_cluster
    from uniemox_dist.config.schema import Config

    limit = {"max_timeouts": options.pop("max_timeouts")} if "max_timeouts" in options else {}
    site = cluster if isinstance(cluster, str) else "given in Python"
    found = load_cluster(cluster) if isinstance(cluster, str) else cluster
    if isinstance(run, str | Config):
        request = dispatch.Request(run, found, site, overrides, **options)
    else:
        request = dispatch.Request(None, found, site, command=(*run, *overrides), **options)
    job: Job[int] = dispatch.submit(request, Submitit(**limit)).job
    return job
