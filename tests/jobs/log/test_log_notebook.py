import json
from pathlib import Path

from log_rows import write_log

NOTEBOOK = Path(__file__).parents[3] / "docs" / "log.ipynb"


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "runs" / "one" / "log.zarr", steps=6, batch=40)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "960 views, 1,440 pairs" in printed and "{'row': 240, 'view': 4, 'pair': 6}" in printed
    assert "all jointly" in printed
