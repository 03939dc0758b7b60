"""Write the repository's address into every place that carries it: `python tools/colab_links.py owner/name`.

The places are `utils/runtime/project.py`, the bootstrap cell (its text is `tools/bootstrap_cell.py`, and every notebook
carries a copy) and the README's badges. `--check` says whether they agree, `--sync` rewrites the copies from the
address that is stamped already. An empty address ("") takes the stamp off.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAMP = re.compile(r'^REPOSITORY = "([^"\n]*)"  # stamped by make colab-links$', re.MULTILINE)
BADGES = re.compile(r"(<!-- colab-badges -->\n).*?(<!-- /colab-badges -->)", re.DOTALL)
# GitHub's rules: an owner has letters, digits and inner hyphens, a name has dots and underscores too.
ADDRESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,37}[A-Za-z0-9])?/(?!\.{1,2}$)[A-Za-z0-9._-]{1,100}")
PROJECT, CELL, README = "utils/runtime/project.py", "tools/bootstrap_cell.py", "README.md"


class LinkError(Exception):
    """An address or a file that cannot be stamped; the text says what to do."""


def check_address(address: str) -> str:
    """Return a usable owner/name, or explain."""
    if address and (not ADDRESS.fullmatch(address) or address.endswith(".git")):
        raise LinkError(
            f"{address!r} is not a repository's address. Expected owner/name as on GitHub, without a host or .git. "
            "Run: make colab-links REPO=owner/name"
        )
    return address


def stamped(text: str, address: str, place: str) -> str:
    """Return source text with the address in its stamped line."""
    if len(STAMP.findall(text)) != 1:
        raise LinkError(
            f"{place} has {len(STAMP.findall(text))} lines of the form "
            'REPOSITORY = "..."  # stamped by make colab-links. Expected exactly one. Restore the line and run again.'
        )
    return STAMP.sub(f'REPOSITORY = "{address}"  # stamped by make colab-links', text)


def bootstrap_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the code cells tagged ``bootstrap``."""
    return [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "bootstrap" in cell.get("metadata", {}).get("tags", [])
    ]


def with_bootstrap(text: str, cell_text: str, place: str) -> str:
    """Return a notebook's JSON with the bootstrap cell's text in it."""
    notebook = json.loads(text)
    cells = bootstrap_cells(notebook)
    if len(cells) != 1:
        raise LinkError(f"{place} has {len(cells)} code cells tagged bootstrap. Expected exactly one. Tag the cell.")
    cells[0]["source"] = cell_text.rstrip("\n").splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_badges(text: str, address: str) -> str:
    """Return the README with its badges for an address."""
    from utils.runtime.project import NOTEBOOKS, colab_badge

    if len(BADGES.findall(text)) != 1:
        raise LinkError(
            f"{README} has no pair of lines <!-- colab-badges --> and <!-- /colab-badges -->. "
            "Put them where the badges go."
        )
    badges = "\n\n".join(colab_badge(notebook, address) for notebook in NOTEBOOKS)
    return BADGES.sub(lambda match: f"{match[1]}{badges}\n{match[2]}", text)


def current_address(root: Path) -> str:
    """Return the address stamped into the project file."""
    found = STAMP.findall((root / PROJECT).read_text(encoding="utf-8"))
    if len(found) != 1:
        raise LinkError(f"{PROJECT} has no stamped line REPOSITORY. Restore it and run again.")
    return str(found[0])


def planned(root: Path, address: str) -> dict[Path, tuple[str, str]]:
    """Return every place with its present text and the text for an address."""
    plan: dict[Path, tuple[str, str]] = {}
    for name in (PROJECT, CELL):
        text = (root / name).read_text(encoding="utf-8")
        plan[root / name] = (text, stamped(text, address, name))
    cell = plan[root / CELL][1]
    for path in sorted(root.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        plan[path] = (text, with_bootstrap(text, cell, path.name))
    if (root / README).exists():
        text = (root / README).read_text(encoding="utf-8")
        plan[root / README] = (text, with_badges(text, address))
    return plan


def write(root: Path, address: str) -> list[str]:
    """Write an address into every place; return the names of the files that changed."""
    plan = planned(root, check_address(address))
    changed = [path for path, (old, new) in plan.items() if old != new]
    for path in changed:
        path.write_text(plan[path][1], encoding="utf-8")
    return [path.relative_to(root).as_posix() for path in changed]


def disagreeing(root: Path) -> list[str]:
    """Return the files that do not carry the address of the project file."""
    plan = planned(root, current_address(root))
    return [path.relative_to(root).as_posix() for path, (old, new) in plan.items() if old != new]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Stamp the repository's address into badges and notebooks.")
    parser.add_argument("address", nargs="?", help="owner/name")
    parser.add_argument("--check", action="store_true", help="only say whether all places agree")
    parser.add_argument("--sync", action="store_true", help="write the stamped address and the bootstrap cell again")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            names = disagreeing(options.root)
            if names:
                print(f"These differ from {PROJECT} and {CELL}: {', '.join(names)}. Run: make notebooks")
                return 1
            print(f"All places agree: {current_address(options.root) or 'no address is stamped'}.")
            return 0
        if options.address is None and not options.sync:
            print("No address was given. Run: make colab-links REPO=owner/name", file=sys.stderr)
            return 2
        address = current_address(options.root) if options.sync else options.address
        names = write(options.root, address)
        print(f"{address or 'No address'}: {', '.join(names) + ' written' if names else 'nothing to change'}.")
    except LinkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
