"""The page of metrics and spans is what the catalogues say, and a page that is not is found out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "observability_reference.py"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, with a copy of the page."""
    spec = importlib.util.spec_from_file_location("observability_reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = tmp_path / "page.md"
    page.write_text(module.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--check"])
    return module


def test_the_page_is_as_generated(tool: Any) -> None:
    assert tool.main() == 0


@pytest.mark.parametrize("name", ["hasgpu_queue_length", "gateway.queue"])
def test_a_stale_part_is_told_and_mended(
    tool: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tool.PAGE.read_text(encoding="utf-8")
    stale = good.replace(f"| `{name}` |", f"| `{name}.old` |")
    assert stale != good
    tool.PAGE.write_text(stale, encoding="utf-8")
    assert tool.main() == 1
    assert "is stale; run python tools/observability_reference.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(TOOL)])
    assert tool.main() == 0
    assert tool.PAGE.read_text(encoding="utf-8") == good


def test_a_page_without_the_marks_is_refused(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tool.PAGE.write_text(tool.PAGE.read_text(encoding="utf-8").replace("<!-- spans: end -->", ""), encoding="utf-8")
    assert tool.main() == 1
    assert "expected the lines '<!-- spans: begin" in capsys.readouterr().out
