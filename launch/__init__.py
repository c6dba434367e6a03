"""Recipes, and ways to start a run: on this machine, and on clusters. Torch-free."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit import Job

    from launch.cluster import Cluster
    from uniemox_dist.config.schema import Config


def submit(run: "str | Config", cluster: "str | Cluster", *overrides: str, **options: Any) -> "Job[int]":
    """Submits a run through submitit; its result is the exit code 0, anything else is an error of the job.

    Args:
        run: a recipe's path or name, or a configuration.
        cluster: a cluster file's path or name, or the cluster as a value.
        overrides: KEY=VALUE pairs on top.
        options: fields of `launch.dispatch.Order`, such as resume=True; and max_timeouts, the number of time
            limits that the run may reach.

    Raises:
        UserError: with a line for each thing that would make the job fail; then nothing was submitted.
    """
    from launch.backends.submitit import submit as submit_job

    return submit_job(run, cluster, *overrides, **options)
