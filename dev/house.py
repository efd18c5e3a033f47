"""Measure the house: how much code is in src/anvi, and how much of it a call walks through.

python dev/house.py [ROOT]            counts per folder of a checkout, by default of this one
python dev/house.py [ROOT] --trips    also the files and functions that common calls enter

Code lines are lines that hold more than docstrings, comments and blanks. A trip is traced in a second, equal call, so
that imports and caches are not part of it; a function that was entered counts with all of its own lines.
"""

# ruff: noqa: T201
import argparse
import ast
import io
import logging
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("files", "lines", "code", "functions", "values", "checks")
CONTAINERS = {"AnnData", "MuData", "Data"}
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Trip(NamedTuple):
    """What a call entered."""

    files: tuple[str, ...]  # relative to the package, those with a function that was entered
    file_code: int  # code lines of these files
    functions: int
    code: int  # code lines of these functions


def count(root: str | Path) -> dict[str, Counter]:
    """Count the package of a checkout by folder; files beside `__init__` are under ".", sums under "total".

    Parameters
    ----------
    root
        Folder that has `src/anvi`.

    Returns
    -------
    For each folder a Counter of `files`, `lines`, `code` (lines of code), `functions` (methods and inner functions
    included), `values` (classes that are NamedTuple, TypedDict or dataclass) and `checks` (isinstance of AnnData or
    MuData outside `_data`).
    """
    package, folders = Path(root) / "src" / "anvi", {}
    for path in sorted(package.rglob("*.py")):
        text, folder = path.read_text(), path.relative_to(package).parts[:-1]
        nodes = list(ast.walk(ast.parse(text)))
        folders.setdefault("/".join(folder) or ".", Counter()).update(
            files=1,
            lines=len(text.splitlines()),
            code=len(code_lines(path)),
            functions=sum(isinstance(node, Function) for node in nodes),
            values=sum(_is_value(node) for node in nodes),
            checks=0 if "_data" in folder else sum(_is_check(node) for node in nodes),
        )
    total = Counter()
    for counts in folders.values():
        total.update(counts)
    return folders | {"total": total}


def trip(call: Callable[[], object]) -> Trip:
    """Trace what a call enters of anvi; it is called twice, so it must be able to start again.

    Parameters
    ----------
    call
        Takes nothing: `lambda: av.tl.totalanvi(mdata, batch_key="batch")`.
    """
    import anvi

    package, entered = Path(anvi.__file__).resolve().parent, set()
    call()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, arg: entered.add(frame.f_code) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(before)
    own = {(path, *key): lines for path in package.rglob("*.py") for key, lines in functions(path).items()}
    seen = {(Path(code.co_filename).resolve(), code.co_firstlineno, code.co_name) for code in entered}
    lines = {key: own[key] for key in seen & own.keys()}  # neither modules nor lambdas and comprehensions
    files = sorted({path for path, *_ in lines})
    return Trip(
        files=tuple(path.relative_to(package).as_posix() for path in files),
        file_code=sum(len(code_lines(path)) for path in files),
        functions=len(lines),
        code=sum(map(len, lines.values())),
    )


@cache
def code_lines(path: Path) -> frozenset[int]:
    """Numbers of the lines that hold code."""
    text, lines = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return frozenset(lines)


def functions(path: Path) -> dict[tuple[int, str], frozenset[int]]:
    """Code lines of each function without those of functions inside it, by its first line (of decorators) and name."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]
    spans = {(_first(node), node.name): set(range(_first(node), node.end_lineno + 1)) for node in nodes}
    inner = {key: [span for span in spans.values() if span < own] for key, own in spans.items()}
    return {key: code_lines(path) & own.difference(*inner[key]) for key, own in spans.items()}


def _first(node: Function) -> int:
    """The line that Python calls the first of a function: that of its first decorator."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _names(node: ast.AST) -> set[str]:
    """Every name in an expression, the last part of dotted ones."""
    return {
        part.id if isinstance(part, ast.Name) else part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Name | ast.Attribute)
    }


def _is_value(node: ast.AST) -> bool:
    """Whether this is a class that only holds values."""
    if not isinstance(node, ast.ClassDef):
        return False
    bases, decorators = set().union(*map(_names, node.bases)), set().union(*map(_names, node.decorator_list))
    return bool(bases & {"NamedTuple", "TypedDict"}) or "dataclass" in decorators


def _is_check(node: ast.AST) -> bool:
    """Whether this asks if something is an AnnData or a MuData."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    return called and bool(_names(node.args[1]) & CONTAINERS)


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls that are traced: a fit of 1,500 cells, enough for calibration and novelty, and what is asked of it."""
    import anvi as av

    data = av.datasets.synthetic_cite(1500, n_genes=60)
    query = data[data.obs["batch"] == "batch_1"].copy()
    query.obs["batch"] = "new"  # of a batch that the model knows nothing would be trained
    short = {"batch_key": "batch", "max_epochs": 2}
    fitted = av.tl.totalanvi(data, **short, copy=True)
    yield "totalanvi", lambda: av.tl.totalanvi(data, **short, copy=True)
    yield "predict", lambda: av.tl.predict(fitted)
    yield "denoise", lambda: av.tl.denoise(fitted)
    yield "attributions", lambda: av.tl.attributions(fitted, n_cells=5)
    yield "differential_expression", lambda: av.tl.differential_expression(fitted, "cell_type", n_samples=100)
    yield "map_query", lambda: av.tl.map_query(query, fitted, max_epochs=2, copy=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--trips", action="store_true", help="trace common calls, which takes a minute or two")
    options = parser.parse_args()
    print(f"{'src/anvi':<12}", *(f"{name:>10}" for name in COLUMNS))
    for folder, counts in count(options.root).items():
        print(f"{folder:<12}", *(f"{counts[name]:>10,}" for name in COLUMNS))
    if not options.trips:
        return
    sys.path.insert(0, str(options.root.resolve() / "src"))
    import anvi as av

    if not Path(av.__file__).resolve().is_relative_to(options.root.resolve()):
        parser.error(f"the anvi that was imported is not of {options.root}: {av.__file__}")
    warnings.simplefilter("ignore")
    logging.getLogger("anvi").setLevel(logging.ERROR)
    print(f"\n{'trip':<24}", *(f"{name:>10}" for name in ("files", "their code", "functions", "code")))
    with av.settings.override(progress=False, device="cpu"):
        for name, call in calls():
            found = trip(call)
            print(f"{name:<24} {len(found.files):>10} {found.file_code:>10,} {found.functions:>10} {found.code:>10,}")


if __name__ == "__main__":
    main()
