"""The picture of the README: tokens in lines, each on the shade of its net keep rate."""

import csv

import matplotlib.colors
import pytest

from experiments.figures import shaded_text
from sol_jax.errors import UserError
from sol_jax.generation import shaded_image
from sol_jax.generation.html_page import SHADES


def write(folder, rows):
    path = folder / shaded_text.FILE
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("token", "kappa", "rho", "eta"), *rows])
    return folder


def test_tokens_keep_their_shades(tmp_path):
    rows = [("The cat", "", "", ""), (" sat", "0.1", "0.2", "0.3"), (" on\nmats", "1", "1", "1")]
    figure = shaded_text.draw(write(tmp_path, rows))
    (axes,) = figure.axes
    tokens = [patch for patch in axes.patches if patch.get_edgecolor()[3] == 0]
    shades = [matplotlib.colors.to_hex(patch.get_facecolor(), keep_alpha=True) for patch in tokens]
    assert shades == ["#00000000", SHADES[1] + "ff", SHADES[9] + "ff", SHADES[9] + "ff"]
    assert [patch.get_width() for patch in tokens] == [7, 4, 3, 4]
    assert "".join(text.get_text() for text in axes.texts).startswith("The cat sat onmats")


def test_lines_are_cut_between_tokens():
    words = [(f" word{n:03}", 0.5) for n in range(30)]
    lines = shaded_image.lines_of(words)
    assert max(sum(len(part) for part, _ in line) for line in lines) <= shaded_image.WIDTH
    assert "".join(part for line in lines for part, _ in line).replace(" ", "") == "".join(
        word for word, _ in words
    ).replace(" ", "")


def test_without_a_text_it_says_how_to_write_one(tmp_path):
    with pytest.raises(UserError, match="write it with --write"):
        shaded_text.read(tmp_path / "none.csv")
