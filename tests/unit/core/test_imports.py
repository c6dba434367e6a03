"""Imports without collections of cyclic garbage."""

import gc
import json
import subprocess
import sys

import pytest

from uniemox_dist.core.imports import collection_paused

ENCODER = """
import gc, json, sys
from uniemox_dist import load_encoder
full = gc.get_stats()[2]["collections"]
print(json.dumps([full, gc.isenabled(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""
UNUSED = {"deepspeed", "open_clip", "matplotlib", "pandas", "scipy", "pyarrow", "jinja2"}


def test_collections_are_paused_inside_and_as_before_afterwards() -> None:
    assert gc.isenabled()
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), collection_paused():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.long
def test_load_encoder_imports_in_one_go_and_only_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", ENCODER], capture_output=True, text=True, check=True)
    full_collections, enabled, packages = json.loads(done.stdout)
    assert (full_collections, enabled) == (0, True)
    assert "timm" in packages
    assert set(packages) & UNUSED == set()
