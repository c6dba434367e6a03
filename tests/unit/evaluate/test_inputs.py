"""The inputs of an evaluation."""

from pathlib import Path

import pytest

from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.inputs import check_group_attribute, open_splits


def test_an_attribute_of_groups_that_no_sample_has_is_refused_with_those_that_exist(tiny_data: Path) -> None:
    readers = open_splits(str(tiny_data), {}, ("train", "test"))
    check_group_attribute(readers, "family")
    check_group_attribute(readers, None)
    with pytest.raises(UserError) as caught:
        check_group_attribute(readers, "famliy")
    line = str(caught.value)
    assert line.startswith("--group-by=famliy: no sample has this attribute; samples have ")
    assert "family" in line.partition("samples have ")[2].split(", ")
