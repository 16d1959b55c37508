"""The style sheet of the page of a shaded text: `page.css`, the shades, and what the buttons put in force."""

import importlib.resources

# Background of a token by the tenth that its cost reaches.  One hue, ever stronger: it can be read in grey,
# and by whom red and green are alike.  Text has a contrast of at least 4.8 on each, black on the light ones
# and white on the dark ones.
SHADES = ("#ffffff", "#f0f6fc", "#e1edf8", "#d0e3f3", "#bfd9ee",
          "#aecee9", "#9cc3e3", "#85b4da", "#68a3d0", "#4292c6")  # fmt: skip
DARK_SHADES = ("#14181d", "#15212c", "#172a3b", "#18334b", "#193c5a",
               "#1a456a", "#1b4e7a", "#1c578a", "#1c609a", "#1d6aab")  # fmt: skip

AXIS_CLASSES = "abcdfghijlmopqrstuvwyz"  # one letter an axis; k is for all of them, the rest are marks


def style(axes: int, sides: int) -> str:
    """The whole style sheet of a page with so many axes and texts."""
    light, dark = _shades(SHADES), _shades(DARK_SHADES)
    rules = [
        importlib.resources.files(__package__).joinpath("page.css").read_text("utf-8"),
        f":root {{ {light} }}",
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
        f"@media print {{ :root {{ {light} }} }}",
        *(f".k{i} {{ background: var(--k{i}); }}" for i in range(len(SHADES))),
    ]
    for x in range(axes):
        chosen = f"body:has(#by-{x}:checked) .text .{AXIS_CLASSES[x]}"
        rules += [f"{chosen}{i} {{ background: var(--k{i}); }}" for i in range(len(SHADES))]
    for n in range(sides):
        rules.append(f"body:has(#show-{n}:checked) .sides > section:not(.side-{n}) {{ display: none; }}")
    return "\n".join(rules) + "\n"


def _shades(shades: tuple[str, ...]) -> str:
    return " ".join(f"--k{i}: {colour};" for i, colour in enumerate(shades))
