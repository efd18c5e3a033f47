"""The subcommands of `python -m anvi` but the demo: options in, an answer out; `__main__` prints it.

Defaults are those of the verbs: an option that was not given is not passed on.
"""

import inspect
import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

ENDINGS = (".h5mu", ".h5ad")


class UsageError(Exception):
    """What was asked for cannot be meant: no such file, an option that does not belong there."""


class Answer(NamedTuple):
    """What a subcommand has to say."""

    text: str
    facts: dict  # the same and more, for JSON
    code: int = 0


def run(options: Namespace) -> Answer:
    """Run a subcommand; errors are those of the verbs, or a :class:`UsageError` before any work."""
    return {"fit": fit, "predict": predict, "map": map_, "check": check, "card": card}[options.command](options)


def fit(options: Namespace) -> Answer:
    """Fit one of the four models to a file."""
    import anvi as av

    verb = getattr(av.tl, options.method)
    given = _given(options, verb, options.method) | _settings(options.set, verb)
    _check_out(options)
    data = _read(options.file)
    verb(data, **given)
    key = str(given.get("key_added", options.method)).removeprefix("X_")
    model = av.get.model(data, key)
    _write(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name, "info": model.info} | _classes(data, model, key)
    return Answer(f"{options.out}: {model!r}, {model.info['epochs']} epochs, under '{key}'", facts)


def predict(options: Namespace) -> Answer:
    """Predict the classes of a file's cells."""
    import anvi as av
    from anvi._find import find_reference, resolve

    given = _given(options, av.tl.predict, "predict")
    _check_out(options)
    data, asked = _read(options.file), options.model
    if asked is not None and Path(asked).suffix in ENDINGS:
        asked = find_reference(_existing(Path(asked)), options.model_key)[0]
    elif options.model_key is not None:
        raise UsageError("--model-key is for a --model that is a fitted file.")
    model, key = resolve(data, asked)
    av.tl.predict(data, model=asked, **given)
    key = str(given.get("key_added", key)).removeprefix("X_")
    _write(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name} | _classes(data, model, key)
    return Answer(f"{options.out}: {_told(facts)}", facts)


def map_(options: Namespace) -> Answer:
    """Map a file's cells onto a fitted model."""
    import anvi as av
    from anvi._data import slots
    from anvi._find import find_reference

    given = _given(options, av.tl.map_query, "map")
    _check_out(options)
    reference = find_reference(_existing(options.reference), options.model)[0]
    data = _read(options.file)
    av.tl.map_query(data, reference, **given)
    key = str(given.get("key_added", reference.key)).removeprefix("X_")
    model = av.get.model(data, key)
    told = slots.home(data, model.setup).uns[key]["reference"]
    _write(data, options.out)
    facts = {"file": str(options.out), "key": key, "model": model.name, "reference": told} | _classes(data, model, key)
    matched = f"{told['genes_matched']:.1f} % of the genes matched"
    return Answer(f"{options.out}: {matched}; {_told(facts)}", facts)


def check(options: Namespace) -> Answer:
    """Say what a fit would make of a file."""
    import anvi as av

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
    import anvi as av

    if options.out is not None:
        _check_place(options.out, options.overwrite)
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


def _given(options: Namespace, verb: Callable, name: str) -> dict:
    """Options of the command line that are arguments of the verb, as far as they were given."""
    own = set(inspect.signature(verb).parameters)
    given = {key: value for key, value in vars(options).items() if key not in _NOT_PASSED}
    foreign = sorted(set(given) - own)
    if foreign:
        raise UsageError(f"--{foreign[0].replace('_', '-')} is no option of {name}.")
    return given


_NOT_PASSED = (
    "command file out reference source method model model_key set json quiet debug overwrite criticism".split()
)


def _settings(pairs: list[str], verb: Callable) -> dict:
    """Further arguments from NAME=VALUE; a value is JSON where it can be and the verb does not ask for text."""
    found, own = {}, inspect.signature(verb).parameters
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in ("copy", "data"):
            raise UsageError(f"--set {pair}: this takes NAME=VALUE with an option of the fit, e.g. --set n_hidden=256.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
        kind = str(own[name].annotation) if name in own else ""
        if kind.partition(" |")[0] == "str" and isinstance(found[name], int | float):
            found[name] = value  # a column or a key may be called 3
    return found


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    return path


def _check_out(options: Namespace) -> None:
    """Raise before work starts if there is nothing to read, or nowhere to write."""
    source, out = _existing(options.file), options.out
    if out.suffix != source.suffix:
        raise UsageError(f"{out} must end in {source.suffix}, as the file that is read.")
    _check_place(out, options.overwrite)


def _check_place(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder.")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} is there already; --overwrite replaces it.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")


def _read(path: Path):
    import anndata
    import mudata

    if _existing(path).suffix not in ENDINGS or path.is_dir():
        raise UsageError(f"{path} must be a .h5mu or .h5ad file.")
    try:
        data = mudata.read_h5mu(path) if path.suffix == ".h5mu" else anndata.read_h5ad(path)
        if path.suffix == ".h5mu" and not data.mod:  # mudata 0.4 reads an .h5ad as nothing
            raise ValueError("it has no modality")
        return data
    except (
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # of what is not its own
        raise ValueError(f"{path} cannot be read as a {path.suffix} file ({error}).") from error


def _write(data, path: Path) -> None:
    """Write beside the file first, so that a full disk leaves what was there."""
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        data.write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _classes(data, model, key: str) -> dict:
    """Cells by predicted class, where there are predictions."""
    from anvi._data import slots

    obs = slots.home(data, model.setup).obs
    if slots.prediction(key) not in obs:
        return {}
    counts = obs[slots.prediction(key)].value_counts()
    confidence = float(obs[slots.confidence(key)].mean())
    return {"predicted": {str(name): int(n) for name, n in counts.items()}, "mean_confidence": confidence}


def _told(facts: dict) -> str:
    predicted = ", ".join(f"{name} {n}" for name, n in facts.get("predicted", {}).items())
    return predicted or f"latent space under '{facts['key']}'"


def plain(value):
    """Facts as JSON can hold them: numbers of numpy as numbers, missing and infinite ones as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
