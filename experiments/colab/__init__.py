"""Notebooks for Colab and for Jupyter: what installs them, what their form is, and what runs them."""
