from __future__ import annotations

from pathlib import Path

import pytest
from hasgpu_core.errors import InvalidError, UnavailableError
from hasgpu_node_agent.adapters import node_names
from hasgpu_node_agent.adapters.node_names import claimed_name
from hasgpu_node_agent.settings import load


def test_agents_that_are_started_alike_get_different_names_and_successors_the_same(tmp_path: Path) -> None:
    with claimed_name(tmp_path, "node*") as first, claimed_name(tmp_path, "node*") as second:
        assert (first, second) == ("node1", "node2")
    with claimed_name(tmp_path, "node*") as again:
        assert again == "node1"


def test_a_name_without_a_star_is_the_name(tmp_path: Path) -> None:
    with claimed_name(tmp_path / "absent", "box") as name:
        assert name == "box"


def test_too_many_agents_and_a_folder_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_names, "LARGEST_NUMBER", 1)
    refused = pytest.raises(UnavailableError, match=r"HASGPU_NODE=n\*: .* up to n1")
    with claimed_name(tmp_path, "n*"), refused, claimed_name(tmp_path, "n*"):
        pass
    with pytest.raises(InvalidError, match="HASGPU_STATE_DIR"), claimed_name(tmp_path / "absent", "n*"):
        pass


def test_the_setting_takes_a_star_at_the_end_alone() -> None:
    assert load({"HASGPU_NODE": "node*"}).node == "node*"
    for refused in ("no*de", "a.*", "-*"):
        with pytest.raises(InvalidError, match="HASGPU_NODE"):
            load({"HASGPU_NODE": refused})
