"""Every figure, from made-up CSVs: what it draws, that it repeats, and what it says without them."""

import importlib
import pathlib
import re
import subprocess
import sys

import made_up_results
import numpy as np
import pytest

from configs import single_axis, sol_j_2l, sol_j_3l, sol_j_fl
from experiments.figures import __main__ as figures
from experiments.figures import front, plots
from sol_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of FL, one of everything else; all but two of the single-axis sets."""
    folder = tmp_path_factory.mktemp("results")
    made_up_results.write(folder, "sol-j-2l", sol_j_2l.get_config(), num_random=20)
    made_up_results.write(folder, "sol-j-3l", sol_j_3l.get_config(), num_random=20)
    for seed in (0, 1):
        made_up_results.write(folder, "sol-j-fl-t16", sol_j_fl.get_config(), seed, num_random=20)
    for T in (4, 64):
        made_up_results.write(folder, f"sol-j-fl-t{T}", sol_j_fl.get_config(), horizon=T)
    for name in list(single_axis.LEVELS)[:7]:
        made_up_results.write(folder, name, single_axis.get_config(name))
    made_up_results.write_pollution(folder)
    made_up_results.write_downstream(folder)
    made_up_results.write_transfer(folder)
    made_up_results.write_pages(folder)
    made_up_results.write_clock(folder)
    return folder


@pytest.mark.parametrize("name", figures.NAMES)
def test_it_is_drawn_and_repeats(name, folder, tmp_path):
    module = importlib.import_module(f"experiments.figures.{name}")
    images = [plots.save(module.draw(folder), tmp_path / f"{n}.png").read_bytes() for n in range(2)]
    assert images[0] == images[1]
    assert images[0].startswith(b"\x89PNG")
    figure = module.draw(folder)
    texts = [text.get_text() for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label)]
    if name not in ("figure4", "figure7", "figure11", "quest_pages", "clock"):
        assert plots.NET in texts  # what the net keep rate is stands on the figure
    assert figure._suptitle.get_text().startswith("smollm2-135m")
    plots.plt.close(figure)


def test_panels_and_numbers(folder):
    """Three panels; the policy's line is what the CSV says, seeds averaged."""
    from experiments.figures import figure2

    figure = figure2.draw(folder)
    top, bottom = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title() for axes in top] == list(figure2.RUNS.values())
    rows = plots.front_rows(plots.load(folder, "smollm2-135m/sol-j-fl-t16-s*"))
    requested = sorted({row.per_axis("requested") for row in rows})
    assert len(requested) == 5  # the sweeps of single axes are left out
    policy = top[2].containers[0].lines[0]
    expected = [
        np.mean(
            [row.perplexity for row in rows if row.controller == "policy" and row.per_axis("requested") == r]
        )
        for r in requested
    ]
    np.testing.assert_allclose(policy.get_ydata(), expected)
    gains = plots.points(rows, "fixed", "gain")
    one = [row for row in rows if row.controller == "fixed" and row.per_axis("requested") == requested[0]]
    assert len(one) == 2
    assert gains[0].low == min(row.gain_low for row in one)
    assert gains[0].high == max(row.gain_high for row in one)
    assert {container.get_label() for container in bottom[0].containers} == {
        plots.STYLES[name]["label"] for name in ("fixed", "random", "random_best")
    }
    plots.plt.close(figure)


def test_shares_of_draws_beaten(folder):
    """The made-up policy beats nearly every draw: 0.25 nats behind, spread by 0.05."""
    from experiments.figures import figure9

    figure = figure9.draw(folder)
    shares = [float(text.get_text().rstrip("%")) for axes in figure.axes for text in axes.texts]
    assert len(shares) == 3 * 5  # of the diagonal
    assert min(shares) >= 95
    plots.plt.close(figure)


def test_draws_of_less_text_go_before(folder, tmp_path):
    """Runs with draws alone are shown; NAME-random is taken before the draws beside NAME."""
    with pytest.raises(UserError, match="no CSV named sol-j-2l, sol-j-3l"):
        plots.with_random_schedules(tmp_path, {"sol-j-2l": "2L", "sol-j-3l": "3L"})
    made_up_results.write(tmp_path, "sol-j-2l", sol_j_2l.get_config())
    for name in ("sol-j-3l", "sol-j-3l-random"):
        made_up_results.write(tmp_path, name, sol_j_3l.get_config(), num_random=5)
    assert plots.with_random_schedules(tmp_path, {"sol-j-2l": "2L", "sol-j-3l": "3L"}) == {
        "sol-j-3l-random": "3L"
    }
    from experiments.figures import figure8

    figure = figure8.draw(tmp_path)
    assert [axes.get_title() for axes in figure.axes] == ["3L, 27 actions"]
    plots.plt.close(figure)


def test_means_of_tasks(folder, tmp_path):
    """A point is the mean of three tasks; its bar is narrower than any one's by about the root of three."""
    from experiments.figures import figure6

    rows = plots.load(folder, "smollm2-135m/downstream-sol-j-fl-t16-page-s*")
    first = figure6.points(rows, figure6.COMMON, "fixed")[0]
    mine = [r for r in rows if r.task in figure6.COMMON and r.controller == "fixed" and r.net == 0.4]
    assert first.x == pytest.approx(0.4)
    assert first.y == pytest.approx(np.mean([row.accuracy for row in mine]))
    half = np.mean([row.accuracy_high - row.accuracy for row in mine])
    assert first.high - first.y == pytest.approx(half / np.sqrt(3), rel=0.02)
    nats = figure6.points(rows, ("gsm8k",), "fixed")[0]
    assert nats == pytest.approx((0.4, 2.7, 2.66, 2.75))
    made_up_results.write_downstream(tmp_path, tasks=("arc_easy",))
    few = plots.load(tmp_path, "smollm2-135m/downstream-sol-j-fl-t16-page-s*")
    assert figure6.points(few, figure6.COMMON, "fixed") == []
    figure = figure6.draw(tmp_path)
    assert [text.get_text() for text in figure.axes[1].texts] == ["not run"]
    assert len(figure.axes[3].containers) == len(figure6.CONTROLLERS)
    # The joint policy's GSM8K is no substitute for the one with token sparsity alone.
    assert [text.get_text() for text in figure.axes[2].texts] == ["not run"]
    made_up_results.write_downstream(tmp_path, tasks=("gsm8k",), run="reasoning")
    assert len(figure6.draw(tmp_path).axes[2].containers) == len(figure6.CONTROLLERS)
    plots.plt.close("all")


def test_tokens_for_a_dense_steps_bytes(folder):
    """Four horizons and controllers; half the bytes are two tokens, and the interval turns round."""
    from experiments.figures import generation

    figure = generation.draw(folder)
    refreshed, left, kept, speed = figure.axes
    assert len(refreshed.containers) == len(left.containers) == 2 * 2
    assert len(kept.containers) == len(speed.containers) == 2 * 2
    row = {"bytes": 0.5, "bytes_low": 0.4, "bytes_high": 0.8}
    assert generation.inverse(row) == {"tokens": 2.0, "tokens_low": 1.25, "tokens_high": 2.5}
    plots.plt.close(figure)


def test_the_clock_has_a_panel_for_each_type_and_context(folder):
    from experiments.figures import clock

    figure = clock.draw(folder)
    assert [axes.get_title() for axes in figure.axes] == [
        f"{dtype}, {context} tokens of context"
        for dtype in ("float32", "bfloat16")
        for context in (256, 2048)
    ]
    for axes in figure.axes:  # neither the dense decoder nor XLA's, which are what the others are beside
        assert len(axes.containers) == 2 * 3
        x, y = axes.containers[0].lines[0].get_xydata()[0]
        assert (x, y) == (0.02, 0.9)
    plots.plt.close(figure)


def test_controllers_of_the_clock_by_name():
    from experiments.figures.clock import named

    rows = [("fixed 0.1/1/16", "kept"), ("fixed 0.1/1/16", "group"), ("fixed 1/0.7/16", "group")]
    assert [named({"controller": name, "rule": rule, "asked": ""}) for name, rule in rows] == [
        "fixed 0.1/1/16",
        "fixed 0.1/1/16 (pages of a group)",
        "fixed 1/0.7/16",  # which reads all pages by any rule
    ]
    assert named({"controller": "mine", "rule": "quest", "asked": "0.4 0.8"}) == "mine 0.4 0.8"


def test_the_clock_has_a_colour_for_each_controller(folder, tmp_path):
    from experiments.figures import clock

    lines = (folder / "clock_cpu.csv").read_text().splitlines()
    fixed = next(line for line in lines if "fixed 0.1/1/16" in line)
    many = [fixed.replace("fixed 0.1/1/16", f"fixed 0.{n}/1/16") for n in range(21)]
    (tmp_path / "clock_cpu.csv").write_text("\n".join([lines[0], *many[:20]]))
    plots.plt.close(clock.draw(tmp_path))
    (tmp_path / "clock_cpu.csv").write_text("\n".join([lines[0], *many]))
    with pytest.raises(UserError, match="21 controllers; there are colours for 20"):
        clock.draw(tmp_path)


def test_what_is_missing_is_said(folder, tmp_path, capsys):
    missing = figures.draw_all(tmp_path / "none", tmp_path / "drawn")
    assert list(missing) == list(figures.NAMES)
    for why in missing.values():
        assert "\n" not in why
        assert re.search(
            r"evaluate|experiments\.(studies\.(pollution|transfer|quest_pages)|tasks\.downstream|benchmarks\.clock)",
            why,
        )
    assert not (tmp_path / "drawn").exists()
    assert figures.draw_all(folder, tmp_path / "drawn") == {}
    assert len(list((tmp_path / "drawn").iterdir())) == len(figures.NAMES)


def test_names_of_results(tmp_path):
    for stem in ("sol-j-fl-t16-s12", "kappa-0.1-s0", "plain"):
        made_up_results.write(tmp_path, "x", sol_j_2l.get_config()).rename(tmp_path / f"{stem}.csv")
    assert [(r.run, r.seed) for r in (plots.read(path)[0] for path in sorted(tmp_path.glob("*.csv")))] == [
        ("kappa-0.1", "0"), ("plain", ""), ("sol-j-fl-t16", "12")
    ]  # fmt: skip
    with pytest.raises(UserError, match="no CSV named none"):
        plots.load(tmp_path, "none")


def test_the_demos_front(folder, tmp_path):
    path = folder / "smollm2-135m" / "sol-j-2l-s0.csv"
    command = [
        sys.executable,
        "-m",
        "experiments.figures.front",
        "--results",
        str(path),
        "--output",
        str(tmp_path / "f.png"),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    command[4] = str(tmp_path / "no.csv")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "is not a CSV of sol_jax.evaluate" in ended.stderr
    assert len(front.draw(plots.read(path)).axes) == 2


def test_the_table_of_results(folder):
    """A line per run; a cell as in the CSV, two seeds averaged, with the outer ends of their intervals."""
    from experiments.figures import table

    head, _, *lines = table.table(folder, "smollm2-135m", "fixed").splitlines()
    assert len(lines) == 5 + 7
    mine = next(line for line in lines if line.startswith("| `sol-j-fl-t16` |"))
    _, _, seeds, *cells, miss, _ = (cell.strip() for cell in mine.split("|"))
    assert (seeds, len(cells)) == ("2", 5)
    assert head.count("|") == mine.count("|")
    rows = plots.load(folder, "smollm2-135m/sol-j-fl-t16-s*")
    same = [r for r in plots.front_rows(rows) if r.controller == "fixed"]
    lowest = min(same, key=lambda r: r.per_axis("requested")).per_axis("requested")
    gains = [r.gain for r in same if r.per_axis("requested") == lowest]
    low, high = min(gains) - 0.05, max(gains) + 0.05
    assert cells[0].startswith(f"{np.mean(gains):+.3f} [{low:+.3f}, {high:+.3f}] at 0.")
    policy = [
        r for r in plots.front_rows(rows) if r.controller == "policy" and r.per_axis("requested") == lowest
    ]
    work = (np.mean([getattr(r, name) for r in policy]) for name in ("bytes", "flops"))
    assert cells[0].endswith(" ({:.2f}, {:.2f})".format(*work))
    off = [
        abs(cost - asked)
        for r in rows
        if r.controller == "policy"
        for cost, asked in zip(r.per_axis("cost"), r.per_axis("requested"), strict=True)
    ]
    assert miss.startswith(f"{max(off):.3f} (")
    with pytest.raises(UserError, match="no CSV with the controller 'swift'"):
        table.table(folder, "smollm2-135m", "swift")
