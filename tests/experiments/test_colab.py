"""The notebook's cells run, in order, at a small size; it is committed without outputs."""

import json
import pathlib

import pytest
import tiny

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "experiments" / "colab").glob("*.ipynb"))


def cells(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_one_cell_of_parameters(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in tags(cell) for cell in code) == 1


@pytest.mark.slow
def test_the_quickstart_trains_and_writes(tiny_folder, tmp_path, monkeypatch, capsys):
    config = tiny.config_for(tiny_folder, **{"train.num_updates": 2, "eval.num_test_blocks": 2})
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in NOTEBOOKS if path.stem == "quickstart")
    space: dict = {}
    for cell in cells(path):
        if cell["cell_type"] != "code" or "install" in tags(cell):
            continue
        exec("".join(cell["source"]), space)
        if "parameters" in tags(cell):
            told = {"eval.num_test_blocks", "train.num_updates", "policy.num_heads"}
            fields = {name: value for name, value in config.flat().items() if name in told}
            fields |= {"model.path": config.model.path, "data.source": config.data.source}
            fields |= {"data.cache_dir": config.data.cache_dir}
            space |= {"CONFIG": "default:smoke", "FIELDS": fields, "MAX_TOKENS": 6, "PROMPT": "the cat"}
    assert "net keep rate" in capsys.readouterr().out
    assert (tmp_path / "runs" / "notebook" / "results.csv").is_file()
    text = space["text"]
    assert text.costs.shape == (len(text.pieces), 3)
    html = text._repr_html_()
    assert html.count("<span") >= len(text.pieces)
    assert "<script" not in html
