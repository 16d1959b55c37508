"""What is said beside results keeps off stdout, and in a notebook looks like no error."""

import sys

from sol_jax.notices import notice


class Kernel:
    """IPython, as far as it tells that a notebook's kernel runs."""

    kernel = object()

    def get_ipython(self):
        return self


def test_a_program_says_it_on_stderr(capsys):
    notice("cutting a corpus")
    assert capsys.readouterr() == ("", "cutting a corpus\n")


def test_a_notebook_shows_it_as_what_its_cell_says(monkeypatch, capsys):
    """Jupyter and Colab draw stderr on red."""
    monkeypatch.setitem(sys.modules, "IPython", Kernel())
    notice("cutting a corpus")
    assert capsys.readouterr() == ("cutting a corpus\n", "")
