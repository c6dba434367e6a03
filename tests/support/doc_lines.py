"""The command lines of README and docs."""

import re
import shlex


def command_lines(text: str) -> list[list[str]]:
    """The words of every `uniemox …` in blocks of shell commands."""
    found = []
    for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;|\|", re.sub(r"\s#.*", "", line)):
                words = part.strip().removeprefix("$ ").removeprefix("srun ").strip()
                if not words.startswith("uniemox "):
                    continue
                try:
                    found.append(shlex.split(words)[1:])
                except ValueError:  # the output of a command, not a command
                    continue
    return found
