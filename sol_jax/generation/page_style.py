"""How the page of a shaded text looks: its colours, light and dark, and which of them are in force."""

# Background of a token by the tenth that its cost reaches.  One hue, ever stronger: it can be read in grey, and
# by whom red and green are alike.  Text has a contrast of at least 5 on each, black on the light ones and
# white on the dark ones.
SHADES = ("#ffffff", "#f0f6fc", "#e1edf8", "#d0e3f3", "#bfd9ee",
          "#aecee9", "#9cc3e3", "#85b4da", "#68a3d0", "#4292c6")  # fmt: skip
DARK_SHADES = ("#14181d", "#15212c", "#172a3b", "#18334b", "#193c5a",
               "#1a456a", "#1b4e7a", "#1c578a", "#1c609a", "#1d6aab")  # fmt: skip

AXIS_CLASSES = "abcdfghijlmopqrstuvwyz"  # one letter an axis; k is for all of them, the rest are marks

_LAYOUT = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
        --ink: #000; --paper: #fff; --quiet: #545454; --line: #767676; --panel: #f2f2f2; --bar: #2171b5; }
* { box-sizing: border-box; }
body { overflow-wrap: anywhere; max-width: 84rem; margin: 0 auto; padding: .8rem max(1rem, env(safe-area-inset-left)) 0; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .3rem 0; }
h2 { font-size: 1.05rem; margin: .6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .small { color: var(--quiet); font-size: .9rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 0 1.6rem; }
.sides > section { min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; font: 1.06rem/1.8 Georgia, serif;
        font-family: Georgia, "Noto Serif", "DejaVu Serif", serif; border: 1px solid var(--line); border-radius: .4rem;
        padding: .6rem .8rem; background: var(--k0); forced-color-adjust: none; color: var(--ink); }
.text b { font-weight: 700; }
.text span { padding: .12em 0; }
.text span:hover { outline: 2px solid var(--ink); }
.text .n::before { content: "\\21b5"; } .text .e::before { content: "\\00b7"; }
.text .x::before { content: "\\25a0"; }
@media (hover: none) {
  .text span:hover::after { content: attr(title); position: fixed; inset: 0 0 auto; padding: .7rem 1rem;
    background: var(--ink); color: var(--paper); font: 1rem/1.4 system-ui, sans-serif; z-index: 2; }
}
.choices { position: sticky; bottom: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .2rem 1.6rem;
           align-items: center; margin: .6rem -1rem; padding: .35rem 1rem; background: var(--panel);
           border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 .9rem; align-items: center; min-width: 0; }
legend { float: left; font-weight: 600; padding: 0 .3rem 0 0; font-size: .9rem; }
label { display: inline-flex; align-items: center; gap: .35rem; min-height: 2.2rem; cursor: pointer; font-size: .9rem; }
label input { width: 1.1rem; height: 1.1rem; margin: 0; accent-color: var(--bar); }
label:focus-within { outline: 2px solid var(--ink); outline-offset: 1px; border-radius: .2rem; }
@supports not selector(:has(a)) { fieldset { display: none; } }
label, legend, .strips, .scale { overflow-wrap: normal; }
.scale { display: flex; align-items: center; gap: .4rem; font-size: .8rem; white-space: nowrap; }
.scale i { display: inline-block; width: 1.1rem; height: 1.1rem; border: 1px solid var(--line); margin-left: -1px;
           forced-color-adjust: none; }
.strips { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content; align-items: center;
          gap: .2rem .6rem; margin: .6rem 0; font-size: .85rem; }
.strips svg { display: block; width: 100%; height: 1.6rem; background: var(--panel); border-bottom: 1px solid var(--line); }
.strips path { fill: var(--bar); }
summary { cursor: pointer; min-height: 2.2rem; display: list-item; padding: .35rem 0; }
summary:focus-visible { outline: 2px solid var(--ink); }
.scroll { overflow: auto; max-height: 24rem; }
table { border-collapse: collapse; font-size: .9rem; } caption { text-align: left; color: var(--quiet); }
td, th { padding: .1rem .9rem .1rem 0; text-align: left; vertical-align: top; font-weight: 400; }
thead th { font-weight: 600; } td.t { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
footer { border-top: 1px solid var(--line); margin-top: 1rem; padding-bottom: 1.5rem; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem 1.2rem; max-width: 44rem; }
@media (max-width: 40rem) {
  body { padding: .5rem .7rem 0; } h1 { font-size: 1.15rem; }
  .text { padding: .5rem .6rem; }
  .choices { margin: .5rem -.7rem; padding: .15rem .7rem; gap: 0 1rem; }
  fieldset { gap: 0 .7rem; } label { min-height: 2.4rem; }
  .scale { display: none; }
}
@media print { .choices { position: static; } .text, .scale i { print-color-adjust: exact; } }
"""


def _shades(shades: tuple[str, ...]) -> str:
    return " ".join(f"--k{i}: {colour};" for i, colour in enumerate(shades))


def style(axes: int, sides: int) -> str:
    """The whole style sheet of a page with so many axes and texts."""
    dark = "--ink: #f2f2f2; --paper: #101317; --quiet: #b4bac2; --line: #7d858f; --panel: #1c2229; --bar: #4a9be0;"
    rules = [f":root {{ {_shades(SHADES)} }}"]
    rules.append(f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} {_shades(DARK_SHADES)} }} }}")
    rules.append(f"@media print {{ :root {{ --ink: #000; --paper: #fff; --panel: #fff; {_shades(SHADES)} }} }}")
    rules += [f".k{i} {{ background: var(--k{i}); }}" for i in range(len(SHADES))]
    for x in range(axes):
        letter = AXIS_CLASSES[x]
        rules += [
            f"body:has(#by-{x}:checked) .text .{letter}{i} {{ background: var(--k{i}); }}"
            for i in range(len(SHADES))
        ]
    for n in range(sides):
        rules.append(f"body:has(#show-{n}:checked) .sides > section:not(.side-{n}) {{ display: none; }}")
    return _LAYOUT + "\n".join(rules) + "\n"
