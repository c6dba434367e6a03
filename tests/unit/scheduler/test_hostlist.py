"""Slurm's node lists."""

import pytest

from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler.hostlist import expand_hostlist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[008-011],login1", ["gpu008", "gpu009", "gpu010", "gpu011", "login1"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[1-2]-ib.site,b", ["a1-ib.site", "a2-ib.site", "b"]),
        (" n[9-10] ", ["n9", "n10"]),
    ],
)
def test_a_list_names_its_nodes_in_order(text: str, names: list[str]) -> None:
    assert expand_hostlist(text) == names


@pytest.mark.parametrize(
    "text", ["n[1-", "n]1[", "n[a-b]", "n[3-1]", "n1,,n2", "n[[1]]", "n[1-99999999]", "a b", "$(x)"]
)
def test_a_text_that_is_not_a_node_list_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand_hostlist(text)
