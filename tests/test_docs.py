"""What the documentation shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmopt import native

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not native.available(), reason="no compiled kernels")
def test_the_server_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        # a receipt's figures are of no interest here, and cores may be busy with other tests
        exec(
            block.replace("quality_budget=0.1", "measure=False, calibration='A table. ' * 400").replace(
                "set_num_threads()", "set_num_threads(1)"
            ),
            names,
        )
    texts = names["texts"]
    assert isinstance(texts, list)
    assert len(texts) == 2
    assert capsys.readouterr().out.strip()
