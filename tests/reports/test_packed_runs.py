"""Reports, comparisons, figures and info of a packed run are those of its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_runs import Writer

from coss_eval import reports
from coss_eval.cli.look import figures, info, pack
from coss_eval.errors import UsageError
from coss_eval.reports.compare import compare
from coss_eval.reports.tables import tidy
from coss_eval.store import Store


@pytest.fixture
def packed(full: Store, tmp_path: Path) -> Store:
    shutil.copytree(full.path, tmp_path / "packed")
    assert pack(tmp_path / "packed") == 0
    assert len(list((tmp_path / "packed").iterdir())) == 3
    return Store(tmp_path / "packed")


@pytest.mark.slow
def test_every_page_and_table_is_the_same(full: Store, packed: Store) -> None:
    written = [reports.write(store.path) for store in (full, packed)]
    assert len(written[0]) == len(written[1]) > 20
    for a, b in zip(*written, strict=True):
        assert a.relative_to(full.path) == b.relative_to(packed.path)
        assert a.read_bytes() == b.read_bytes(), a
    assert reports.headline_text(full) == reports.headline_text(packed)


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["folder packed", "packed packed"])
def test_comparisons_are_the_same(
    sides: str, full: Store, packed: Store, writer: Callable[..., Writer], tmp_path: Path
) -> None:
    other = Writer(Store(tmp_path / "other"), "c", 1.2).everything().store
    expected = compare(full.path, other.path)
    if sides.endswith("packed"):
        other.pack()
    found = compare((packed if sides.startswith("packed") else full).path, other.path)
    assert found.equals(expected)
    assert found["p"].notna().any()


@pytest.mark.slow
def test_commands_take_packed_runs(full: Store, packed: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert tidy(full).equals(tidy(packed))
    run = {
        **{"started": "2025-01-01T00:00:00+0000", "command": "coss-eval robustness", "seed": 0},
        "data": {"name": "tiny", "test": {"n": 60, "limit": None}},
        "models": [{"name": "b", "arch": "resnet18", "sha256": "ab" * 32}],
        "versions": {"torch": "2.15"},
    }
    lines = []
    for store in (full, packed):
        (store.path / "run.json").unlink()
        store.record_run(run)
        assert info(str(store.path)) == 0
        lines.append(capsys.readouterr().out.replace(str(store.path), ""))
    assert lines[0] == lines[1]
    assert f"{len(full.records())} cells" in lines[0]
    assert figures(packed.path) == 0
    assert (packed.path / "figures" / "corruptions_mean.png").exists()


def test_pack_tells_what_it_did(full: Store, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cells = len(full.records())
    with full.claim("another"):
        assert pack(full.path) == 1
    assert "NOT PACKED: another process is at work there" in capsys.readouterr().out
    assert pack(full.path) == 0
    assert pack(full.path) == 0  # again
    assert capsys.readouterr().out == 2 * f"{full.path}: {cells} cells packed\n"
    with pytest.raises(UsageError, match="no finished cells in"):
        pack(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(UsageError, match="pack which runs"):
        pack()
