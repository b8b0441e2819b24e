"""Draw docs/session.svg: the first commands of the README, run, and what they print.

    python docs/session.py FOLDER

FOLDER holds the runs, and runs that are there already are used again. Takes some minutes.
"""

import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = [
    "infl submit influence --test 597 --epochs 3 --local",
    "infl top influence-mnist --k 5 --png top.png",
]
WIDTH = 112

# What rich writes, without the fonts that it fetches from elsewhere.
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>Two commands of infl in a terminal, and what they print</title>
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px;
  line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
<rect fill="#292929" width="{width}" height="{height}" rx="8" />
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main(folder: Path) -> None:
    """Run the commands in a folder and draw what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(record=True, width=WIDTH, file=(folder / "session.txt").open("w"))
    for command in COMMANDS:
        console.print(Text("$ ", style="bold green") + Text(command, style="bold"))
        done = subprocess.run(
            [str(Path(sys.executable).parent / "infl"), *command.split()[1:]],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        console.print(Text(done.stdout.replace(str(folder.resolve()), "/home/you")))
    picture = console.export_svg(code_format=SVG, unique_id="session")
    Path(__file__).with_name("session.svg").write_text(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
