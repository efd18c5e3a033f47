"""Command line, python -m anvi: `fit`, `predict`, `map` from file to file, `check` a file, its `card`, the `demo`."""

import argparse
import inspect
import json
import math
import os
import re
import sys
import time
import types
import typing
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

import anvi as av

IN_ONE_FILE = (".h5mu", ".h5ad")
METHODS = ("scvi", "scanvi", "totalvi", "totalanvi")
_USER_ERRORS = (ArithmeticError, ImportError, LookupError, OSError, TypeError, ValueError)


class UsageError(Exception):
    """What was asked for cannot be meant: no such file, an option that does not belong there."""


class OutputError(Exception):
    """What is said on stdout has nowhere to go: a pipe that is closed, a disk that is full."""


class Answer(NamedTuple):
    """What a subcommand has to say."""

    text: str
    facts: dict  # the same and more, for JSON
    code: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    0: done; 1: the data or the model are the matter; 2: the command is; 74: the answer could not be written to stdout;
    130: interrupted; 141: whoever read stdout has gone, as `head` does.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show, a Greek letter
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            _say(end="")  # what argparse has said, too
    except OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        if isinstance(error.__cause__, BrokenPipeError):
            return 141
        _complain(f"stdout cannot be written: {error.__cause__}")
        return 74


def _say(text: str = "", end: str = "\n") -> None:
    """Print on stdout, at once."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise OutputError from error


def _complain(text: str) -> None:
    """Print on stderr, if there is somebody to read it."""
    with suppress(OSError):
        print(f"anvi: {text}", file=sys.stderr, flush=True)


def _run(arguments: list[str]) -> int:
    """Run a subcommand and say what came of it; returns the exit code."""
    in_json, debug = "--json" in arguments, False
    try:
        options = _parser(arguments).parse_args(arguments)
        in_json, debug = options.json, options.debug
        from ._runtime import processes

        rank, n_processes = processes()
        if n_processes > 1 and options.command != "fit":
            raise UsageError(f"{options.command} runs in one process: start it without torchrun.")
        quiet = {"progress": False, "verbosity": 0} if options.quiet else {}
        with warnings.catch_warnings(), av.settings.override(**quiet):
            warnings.filterwarnings("ignore", category=FutureWarning)  # what libraries tell each other
            warnings.filterwarnings("ignore", message="Cannot join columns with the same name")  # a gene like a protein
            warnings.showwarning = lambda message, *_: None if rank else _complain(message)
            answer = options.run(options)
    except UsageError as error:
        return _refuse(in_json, error, 2)
    except _USER_ERRORS as error:
        if debug:
            raise
        return _refuse(in_json, error, 1)
    except KeyboardInterrupt:
        return _refuse(in_json, RuntimeError("interrupted"), 130)
    if rank == 0:
        _say(json.dumps(plain(answer.facts), indent=1) if in_json else answer.text)
    return answer.code


def _refuse(in_json: bool, error: BaseException, code: int) -> int:
    from ._runtime import processes

    message, rank = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error), processes()[0]
    _complain(f"process {rank}: {message}" if rank else message)
    if in_json and not rank:  # one answer, as where all went well
        _say(json.dumps({"error": message}))
    return code


def plain(value):
    """Facts as JSON can hold them: numbers of numpy as numbers, missing and infinite ones as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fit(options: Namespace) -> Answer:
    """Fit one of the four models to a file."""
    from ._runtime import processes

    verb = getattr(av.tl, options.method)
    given, rarer = _given(options, verb, options.method), _settings(options.set, verb)
    if both := sorted(given.keys() & rarer.keys()):
        raise UsageError(f"--set {both[0]}: {_flag(both[0])} says another value; leave one of the two out.")
    given |= rarer
    _check_out(options)
    data = _read(options.file)
    verb(data, **given)
    key = str(given.get("key_added", options.method)).removeprefix("X_")
    if processes()[0]:  # the first has the answers
        return Answer("", {})
    model = av.get.model(data, key)
    av.io.save_backed(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name, "info": model.info} | _classes(data, model, key)
    return Answer(f"{options.out}: {model!r}, {model.info['epochs']} epochs, under '{key}'", facts)


def predict(options: Namespace) -> Answer:
    """Predict the classes of a file's cells."""
    from ._find import find_model, find_reference

    given = _given(options, av.tl.predict, "predict")
    _check_out(options, options.model)
    data, asked = _read(options.file), options.model
    if asked is not None and Path(asked).suffix in IN_ONE_FILE:
        asked = find_reference(_existing(Path(asked)), options.model_key)[0]
    elif options.model_key is not None:
        raise UsageError("--model-key is for a --model that is a fitted file.")
    model, key = find_model(data, asked)
    av.tl.predict(data, model=asked, **given)
    key = str(given.get("key_added", key)).removeprefix("X_")
    av.io.save_backed(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name} | _classes(data, model, key)
    return Answer(f"{options.out}: {_told(facts)}", facts)


def map_(options: Namespace) -> Answer:
    """Map a file's cells onto a fitted model."""
    from ._data import slots
    from ._find import find_reference

    given = _given(options, av.tl.map_query, "map")
    _check_out(options, options.reference)
    reference = find_reference(_existing(options.reference), options.model)[0]
    data = _read(options.file)
    av.tl.map_query(data, reference, **given)
    key = str(given.get("key_added", reference.key)).removeprefix("X_")
    model = av.get.model(data, key)
    told = slots.home(data, model.setup).uns[key]["reference"]
    av.io.save_backed(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name, "reference": told} | _classes(data, model, key)
    matched = f"{told['genes_matched']:.1f} % of the genes matched"
    return Answer(f"{options.out}: {matched}; {_told(facts)}", facts)


def check(options: Namespace) -> Answer:
    """Say what a fit would make of a file."""
    report = av.pp.check(_read(options.file), **_given(options, av.pp.check, "check"))
    facts = {"ok": report.ok, "facts": report.facts, "problems": report.problems, "notes": report.notes}
    if report.labels is not None:
        facts["labels"] = report.labels.to_dict()
    if report.cells_per_batch is not None:
        facts["cells_per_batch"] = report.cells_per_batch.to_dict()
    if report.panels is not None:
        facts["measured_proteins"] = {panel: int(n) for panel, n in report.panels.sum().items()}
    return Answer(repr(report), facts, 0 if report.ok else 1)


def card(options: Namespace) -> Answer:
    """Write the model card of a fit."""
    if options.out is not None:
        _check_place(options.out, options.overwrite, options.source)
    given = _given(options, av.io.model_card, "card")
    if _existing(options.source).is_dir():
        if options.criticism:
            raise UsageError("--criticism needs the fitted file: a folder has no cells to compare draws with.")
        source = av.read_model(options.source, device="cpu")
    else:
        source = _read(options.source)
        if options.criticism:
            av.metrics.criticism(source, model=given.get("key"))
    text = av.io.model_card(source, **given)
    if options.out is None:
        return Answer(text.rstrip("\n"), {"card": text})
    options.out.write_text(text, encoding="utf-8")
    return Answer(f"{options.out}: written", {"file": str(options.out), "card": text})


def demo(options: Namespace) -> Answer:
    """The main job from start to end, on data whose truth is known."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is there already, and no folder.")
    import matplotlib

    matplotlib.use("Agg")
    import scanpy as sc

    begun = time.monotonic()
    mdata = av.datasets.synthetic_cite(options.cells)
    _say("Simulated CITE-seq: three batches, two antibody panels (one lacks a quarter of the proteins), one batch")
    _say("without any protein and without labels; half of the other cells are labelled.\n")
    _say(f"{mdata}\n")
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=options.epochs)

    _say("\nWritten into the MuData:")
    for kind in ("obs", "obsm", "uns"):
        for slot in getattr(mdata, kind):
            if slot.removeprefix("X_").startswith("totalanvi"):
                _say(f"  {kind}['{slot}']")
    _say("\nHow well was the truth recovered? (in brackets: the same score with the truth shuffled)")
    for line in _scores(mdata):
        _say(f"  {line}")

    sc.pp.neighbors(mdata, use_rep="X_totalanvi")
    sc.tl.umap(mdata)
    out.mkdir(parents=True, exist_ok=True)
    pictures = ("predictions", "history", "confusion", "panels")
    for name in pictures:
        picture = getattr(av.pl, name)(mdata, show=False, return_fig=True)
        picture.savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")
    mdata.write(out / "demo.h5mu")
    files = f"\nIn {out}/: demo.h5mu, {', '.join(f'{name}.png' for name in pictures)}"
    return Answer(f"{files}\nDone in {time.monotonic() - begun:.0f} s.", {})


def _scores(mdata) -> list[str]:
    """Labels, foreground and hidden proteins against the truth, each beside a shuffled control."""
    from sklearn.metrics import roc_auc_score

    rng, obs = np.random.default_rng(0), mdata.obs
    truth, predicted = obs["true_cell_type"].to_numpy(str), obs["totalanvi_prediction"].to_numpy(str)
    unlabelled = (obs["cell_type"] == "Unknown").to_numpy()
    rna_only = (obs["panel"] == "none").to_numpy()
    lines = []
    for what, chosen in (("unlabelled cells", unlabelled), ("RNA-only batch", rna_only)):
        right, chance = (predicted == truth)[chosen].mean(), (predicted == rng.permutation(truth))[chosen].mean()
        lines.append(f"accuracy of labels, {what}: {right:.3f} ({chance:.3f})")
    av.tl.foreground(mdata)
    foreground = av.get.table(mdata, "true_foreground").to_numpy().ravel() > 0
    called = av.get.table(mdata, "totalanvi_prot_foreground").to_numpy().ravel()
    auroc, chance = roc_auc_score(foreground, called), roc_auc_score(rng.permutation(foreground), called)
    lines.append(f"AUROC of protein foreground, all cells: {auroc:.3f} ({chance:.3f})")
    av.tl.denoise(mdata, modality="prot", include_background=True)
    counts = np.log1p(av.get.table(mdata, "true_protein_counts").to_numpy())
    imputed = np.log1p(av.get.table(mdata, "totalanvi_prot_denoised").to_numpy())
    seen = mdata["prot"].to_df().reindex(mdata.obs_names).notna().to_numpy()
    pairs = [(imputed[rows, j], counts[rows, j]) for j, rows in enumerate(~seen.T)]
    pearson = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    chance = np.mean([np.corrcoef(a, rng.permutation(b))[0, 1] for a, b in pairs])
    lines.append(f"mean Pearson correlation of hidden proteins (log1p): {pearson:.3f} ({chance:.3f})")
    return lines


def _classes(data, model, key: str) -> dict:
    """Cells by predicted class, where there are predictions."""
    from ._data import slots

    obs = slots.home(data, model.setup).obs
    if slots.prediction(key) not in obs:
        return {}
    counts = obs[slots.prediction(key)].value_counts()
    confidence = float(obs[slots.confidence(key)].mean())
    return {"predicted": {str(name): int(n) for name, n in counts.items()}, "mean_confidence": confidence}


def _told(facts: dict) -> str:
    predicted = ", ".join(f"{name} {n}" for name, n in facts.get("predicted", {}).items())
    return predicted or f"latent space under '{facts['key']}'"


def _given(options: Namespace, verb: Callable, name: str) -> dict:
    """Options of the command line that are arguments of the verb, as far as they were given."""
    own = set(inspect.signature(verb).parameters)
    given = {key: value for key, value in vars(options).items() if key not in _NOT_PASSED}
    foreign = sorted(set(given) - own)
    if foreign:
        raise UsageError(f"{_flag(foreign[0])} is no option of {name}.")
    return given


_NOT_PASSED = (
    "command run file out reference source method model model_key set json quiet debug overwrite criticism".split()
)


def _settings(pairs: list[str], verb: Callable) -> dict:
    """Further arguments from NAME=VALUE; a value is JSON where it can be and the verb does not ask for text."""
    found, own = {}, inspect.signature(verb).parameters
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in ("callback", "copy", "data"):
            raise UsageError(f"--set {pair}: this takes NAME=VALUE with an option of the fit, e.g. --set n_hidden=256.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        kind = str(own[name].annotation) if name in own else ""
        if kind.partition(" |")[0] == "str" and isinstance(found[name], int | float):
            found[name] = value  # a column or a key may be called 3
    return found


class _Parser(argparse.ArgumentParser):
    """Hands on what is wrong with a command, so that it is said in one way."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message)


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser; the options of a subcommand are read from its verb, which takes a while to import, if it is meant."""
    parser = _Parser(prog="python -m anvi", description=__doc__)
    parser.add_argument("--version", action="version", version=f"anvi {version('anvi')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        one.set_defaults(run=run)
        if name in arguments:
            add(one)
        if add is not _add_demo:  # which says what it does while it does it
            one.add_argument("--json", action="store_true", default=False, help="answer in JSON on stdout")
            one.add_argument("--quiet", action="store_true", default=False, help="no progress on stderr")
            one.add_argument("--debug", action="store_true", default=False, help="show where an error came from")
    return parser


def _add_fit(one: argparse.ArgumentParser) -> None:
    _add_files(one)
    one.add_argument("--method", choices=METHODS, default="totalanvi", help="which model (default: totalanvi)")
    one.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other argument of the fit, value in JSON"
    )
    _add_options(one, av.tl.totalanvi, "data", "copy", "callback", "model_kwargs")


def _add_predict(one: argparse.ArgumentParser) -> None:
    _add_files(one)
    one.add_argument("--model", default=None, help="folder, fitted file, or key in the file; default: the one in it")
    one.add_argument("--model-key", default=None, help="key of the model in the fitted file; default: the one in it")
    _add_options(one, av.tl.predict, "data", "model", "inplace")


def _add_map(one: argparse.ArgumentParser) -> None:
    _add_files(one, reference="fitted file, or folder with a model")
    one.add_argument("--model", default=None, help="key of the model in the reference")
    _add_options(one, av.tl.map_query, "query", "reference", "model", "copy")


def _add_check(one: argparse.ArgumentParser) -> None:
    one.add_argument("file", type=Path, help=".h5mu or .h5ad file")
    _add_options(one, av.pp.check, "data")


def _add_card(one: argparse.ArgumentParser) -> None:
    one.add_argument("source", type=Path, help="fitted file, or folder with a model")
    one.add_argument("--out", type=Path, default=None, help="file to write; default: stdout")
    one.add_argument("--overwrite", action="store_true", default=False, help="replace the file if it is there")
    one.add_argument("--criticism", action="store_true", default=False, help="check the model first (fitted files)")
    _add_options(one, av.io.model_card, "data")


def _add_demo(one: argparse.ArgumentParser) -> None:
    one.set_defaults(json=False, quiet=False, debug=False)
    one.add_argument("--out", type=Path, default=Path("anvi-demo"), help="folder for the .h5mu and the pictures")
    one.add_argument("--cells", type=int, default=2_000, help="cells to simulate")
    one.add_argument("--epochs", type=int, default=60, help="longest fit, in epochs")


def _add_files(one: argparse.ArgumentParser, **others: str) -> None:
    """The files to read and the one to write."""
    one.add_argument("file", type=Path, help=".h5mu or .h5ad file with counts")
    for name, text in others.items():
        one.add_argument(name, type=Path, help=text)
    one.add_argument("out", type=Path, help="file to write, of the same kind")
    one.add_argument("--overwrite", action="store_true", default=False, help="replace the file if it is there")


def _add_options(one: argparse.ArgumentParser, verb: Callable, *without: str) -> None:
    """An option for each argument of a verb: names, types and defaults of its signature, help of its docstring.

    Options that are not given are absent, so that the verb alone knows the defaults.
    """
    texts, hints = _argument_texts(verb), typing.get_type_hints(verb)
    for name, parameter in inspect.signature(verb).parameters.items():
        if name not in without:
            known = "" if parameter.default in (None, "", ()) else f" (default: {parameter.default})"
            text = f"{texts[name]}{known}".replace("%", "%%")
            one.add_argument(_flag(name), help=text, **_argument_type(hints[name]))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Several(argparse.Action):
    """Values as a list, but for a single one that is a word of its own."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 and values[0] in self.const else values)


def _argument_type(annotation: object) -> dict:
    """What argparse must know of a type; what can be written as text is text."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    for kind in kinds:
        origin = typing.get_origin(kind)
        if kind is bool:
            return {"action": argparse.BooleanOptionalAction}
        if kind in (int, float) and str not in kinds:
            return {"type": kind}
        if origin is typing.Literal and len(kinds) - (type(None) in kinds) == 1:
            return {"choices": words}
        if kind is not str and isinstance(origin, type) and not issubclass(origin, Mapping):
            return {"nargs": "+", "action": _Several, "const": words}
        if origin is dict and str not in kinds:
            return {"type": json.loads, "metavar": "JSON"}
    return {}


def _argument_texts(verb: Callable) -> dict[str, str]:
    """What the Parameters section of a docstring says of each argument."""
    section = inspect.getdoc(verb).partition("Parameters\n----------\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line.startswith(" "):
            texts |= {name: f"{texts.get(name, '')} {line.strip()}".strip() for name in names}
        else:
            names = line.split(", ")
    return {name: re.sub(r":\w+:`~?(?:anvi\.)?(.+?)`", r"`\1`", text) for name, text in texts.items()}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    return path


def _check_out(options: Namespace, model: Path | None = None) -> None:
    """Raise before work starts if there is nothing to read, or nowhere to write but over the model that is asked."""
    source, out = _existing(options.file), options.out
    if out.suffix != source.suffix:
        raise UsageError(f"{out} must end in {source.suffix}, as the file that is read.")
    _check_place(out, options.overwrite, model if model != source else None)


def _check_place(out: Path, overwrite: bool, model: Path | None) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} is there already; --overwrite replaces it.")
    if model is not None and out.exists() and Path(model).exists() and out.samefile(model):
        raise UsageError(f"{out} holds the model and would be lost: name another file for the answer.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")


def _read(path: Path):
    if _existing(path).suffix not in IN_ONE_FILE or path.is_dir():
        raise UsageError(f"{path} must be a .h5mu or .h5ad file.")
    try:
        return av.io.open_backed(path)
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:  # of another's file
        raise ValueError(f"{path} cannot be read as a {path.suffix} file ({error}).") from error


COMMANDS = {
    "fit": (fit, _add_fit, "fit a model; options and defaults are those of av.tl.totalanvi, other methods have fewer"),
    "predict": (predict, _add_predict, "predict the cell types of a file with a fitted model"),
    "map": (map_, _add_map, "map the cells of a file onto a fitted model, new batches included"),
    "check": (check, _add_check, "say what a fit would make of a file; 1 if it would not start"),
    "card": (card, _add_card, "write the model card of a fit"),
    "demo": (demo, _add_demo, "simulate CITE-seq with two panels, fit TotalANVI, score it, draw it"),
}


if __name__ == "__main__":
    sys.exit(main())
