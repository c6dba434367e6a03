"""`uniemox`: the commands, found lazily, and the one place where errors become exit codes."""

import atexit
import os
import sys
import time
import traceback
from importlib import import_module

import click

from uniemox_dist import __version__
from uniemox_dist.core.errors import (
    EXIT_FAULT,
    EXIT_USER,
    Fault,
    LostPeer,
    UserError,
    exit_without_teardown,
    missing_extra,
)
from uniemox_dist.core.files import hide_secrets

COMMANDS = {
    "shards": (
        "uniemox_dist.cli.shards",
        "Pack pictures into tar shards; check, describe and choose among them.",
    ),
    "teach": (
        "uniemox_dist.cli.teach",
        "Cache the embeddings of a teacher beside the shards.",
    ),
    "plan": (
        "uniemox_dist.cli.plan",
        "Estimate a run's memory, network, hours, cores and saves.",
    ),
    "doctor": ("uniemox_dist.cli.doctor", "Check a node or an allocation before a run."),
    "pretrain": ("uniemox_dist.cli.pretrain", "Pretrain a student from a recipe."),
    "finetune": ("uniemox_dist.cli.finetune", "Fine-tune an encoder on labelled shards from a recipe."),
    "launch": ("uniemox_dist.cli.launch", "Start runs on clusters."),
    "status": ("uniemox_dist.cli.status", "Show the state of runs: step, pace, last save, faults."),
    "checkpoint": (
        "uniemox_dist.cli.checkpoint",
        "List, verify and prune a run's checkpoints.",
    ),
    "release": ("uniemox_dist.cli.release", "Write consolidated, documented weights of a run."),
    "evaluate": ("uniemox_dist.cli.evaluate", "Measure a release on held-out shards."),
    "embed": ("uniemox_dist.cli.inference", "Embed pictures with a release, into a table."),
    "predict": ("uniemox_dist.cli.inference", "Predict the emotions that pictures evoke."),
    "reconstruct": ("uniemox_dist.cli.inference", "Show how a release reconstructs masked pictures."),
    "report": ("uniemox_dist.cli.report", "Write one HTML page about a run."),
}
# Import name -> the extra that installs it.
EXTRAS = {
    "torch": "models",
    "torchvision": "models",
    "timm": "models",
    "safetensors": "models",
    "deepspeed": "train",
    "open_clip": "train",
    "tensorboard": "train",
    "webdataset": "stream",
    "onnxruntime": "persons",
}


QUIET_S = 0.5
"""Seconds that a rank waits if another rank reports the cause: srun kills all ranks as soon as one ends."""


class LazyGroup(click.Group):
    """A group that imports the module of a command only when that command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="uniemox")
def uniemox() -> None:
    """Pretrain emotion-perception vision transformers, at scale."""


def main() -> None:
    """Runs the command of `sys.argv`. Exit codes: 0 done, 1 fault, 2 user error, 75 saved and to be requeued."""
    code = [EXIT_FAULT]  # that of an exception which `run` does not handle
    atexit.register(exit_without_teardown, code)  # registered first, and so called last
    code[0] = run(sys.argv[1:])
    sys.exit(code[0])


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        code = uniemox.main(arguments, prog_name="uniemox", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USER
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        see = f" See `{context.command_path} --help`." if context is not None else ""
        said = " ".join(error.format_message().split())
        return _say(f"{said}{'' if not see or said.endswith(('.', '?', ')')) else '.'}{see}", EXIT_USER)
    except UserError as error:
        return _say(str(error), EXIT_USER)
    except Fault as error:
        return _say(str(error), EXIT_FAULT, main=not isinstance(error, LostPeer))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            # Names one sufficient extra, instead of one after the other.
            extra = "train" if arguments[:1] in (["pretrain"], ["finetune"], ["teach"]) else EXTRAS[package]
            return _say(str(missing_extra(package, extra)), EXIT_USER)
        traceback.print_exc()
        return EXIT_FAULT
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", EXIT_FAULT)
    except OSError as error:
        if os.environ.get("UNIEMOX_TRACEBACK"):
            traceback.print_exc()
        if isinstance(error, PermissionError) and error.filename is None:  # of a store
            fix = "check the credentials, and that they may list and read there"
            return _say(f"remote storage: no permission ({error}); {fix}", EXIT_USER)
        return _say(f"{error.filename or 'input/output'}: {error.strerror or error}", EXIT_FAULT)
    except Exception as error:
        # botocore's errors are not OSErrors, and importing it for an except clause is slow.
        if type(error).__module__ == "botocore.exceptions" and "Credentials" in type(error).__name__:
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            return _say(f"s3://: {error}; {fix}", EXIT_USER)
        if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            if os.environ.get("UNIEMOX_TRACEBACK"):
                traceback.print_exc()
            fix = "check the address, the network, and the store's settings such as AWS_ENDPOINT_URL"
            return _say(f"remote storage: {' '.join(str(error).split())}; {fix}", EXIT_FAULT)
        raise


def _say(text: str, code: int, *, main: bool = True) -> int:
    """Prints an error; a rank of a Slurm job that writes to its own file also prints it to the job's main log."""
    if not text or not main:
        time.sleep(QUIET_S)
    text = hide_secrets(text)
    rank_output = sys.modules.get("uniemox_dist.runs.rank_output")
    for line in text.splitlines():
        click.echo(f"uniemox: error: {line}", err=True)
        if rank_output is not None and main:
            rank_output.main_log.print_lines(f"uniemox: error: {line}")
    return code
