"""Arguments of public functions, held against their annotations before anything is read or trained."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

import numpy as np

Function = TypeVar("Function", bound=Callable)

RandomState = int | np.random.Generator | None
"""What draws start from; None: something new every time."""

ELSEWHERE = dict.fromkeys(("accelerator", "cuda", "devices", "gpu", "use_cuda", "use_gpu"), "name it: device='cuda'")
ELSEWHERE |= dict.fromkeys(("adata", "mdata", "dataset"), "the object comes first, by its place or as data=")
ELSEWHERE |= dict.fromkeys(("indices", "cells"), "ask about some cells by data[cells]")
ELSEWHERE |= dict.fromkeys(("gene_list", "genes", "protein_list", "proteins", "var_names"), "name them: features=")
ELSEWHERE |= dict.fromkeys(("group1", "idx1"), "name the group: groups=") | {"seed": "it is random_state="}
ELSEWHERE |= dict.fromkeys(("group2", "idx2"), "name what it is compared with: reference=")
ELSEWHERE |= {"batch_size": "memory is bounded without", "give_mean": "the mean is what is given; n_samples= draws"}
ELSEWHERE |= {"fdr_target": "it is fdr=", "return_numpy": "inplace=False returns the answer", "use_rep": "it is basis="}
"""What other packages call an argument, or what there is instead."""


class _Kind(NamedTuple):
    """What an argument may be."""

    what: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _is_axes(value: object) -> bool:
    """Whether these are Axes, one or a list, whose number is another matter."""
    return all(hasattr(one, "plot") and hasattr(one, "figure") for one in np.ravel(value))  # type: ignore[call-overload]


_PATH = _Kind("a path", lambda value: isinstance(value, str | os.PathLike))
_LIST = _Kind("a list of names", _is_list)
_DICT = _Kind("a dict", lambda value: isinstance(value, Mapping))
_KINDS = {
    "None": _Kind("None", lambda value: value is None),
    "NoneType": _Kind("None", lambda value: value is None),
    "bool": _Kind("True or False", lambda value: isinstance(value, bool | np.bool_)),
    "str": _Kind("one name, a str", lambda value: isinstance(value, str)),
    "int": _Kind("a whole number", _is_number),  # ranges are the verbs' matter
    "float": _Kind("a number", _is_number),
    "Path": _PATH,
    "PathLike": _PATH,
    "Sequence": _LIST,
    "list": _LIST,
    "tuple": _LIST,
    "Mapping": _DICT,
    "dict": _DICT,
    "Generator": _Kind("a numpy Generator", lambda value: isinstance(value, np.random.Generator)),
    "RandomState": _Kind("a seed", lambda value: _is_number(value) or isinstance(value, np.random.Generator | None)),
    "Callable": _Kind("a function", callable),
    "Axes": _Kind("Axes of matplotlib", _is_axes),
}


def checked(function: Function) -> Function:
    """A public function that looks at its arguments first."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def run(*args, **kwargs):
        check_arguments(parameters, args, kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def check_arguments(parameters: Mapping[str, inspect.Parameter], args: tuple, kwargs: dict) -> None:
    """Raise an error at the first argument that is not what its annotation says, or that other packages have."""
    in_order = (name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD)
    given = dict(zip(in_order, args, strict=False)) | kwargs  # too many are Python's to tell
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name, value in given.items():
        if name in parameters:
            check_argument(name, value, parameters[name].annotation, parameters[name].default)
        elif name in ELSEWHERE or not open_ended:
            near = difflib.get_close_matches(name, parameters, n=1)
            advice = ELSEWHERE.get(name, f"did you mean {near[0]}=?" if near else "")
            instead = [advice] if advice and {*re.findall(r"(\w+)=", advice)} <= {*parameters} else []
            there = f"there are {', '.join(parameters)}"
            raise TypeError(f"There is no argument '{name}': {'; '.join([*instead, there])}.")


def check_argument(name: str, value: object, annotation: object, default: object = None) -> None:
    """Raise a TypeError unless a value is of an annotated type, a ValueError at an unknown word or names of nothing."""
    kinds = _kinds(annotation)
    value = value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    nothing = "Sequence" in kinds and _is_empty(value) and not _is_empty(default)  # of a choice; a list[str] may be
    of_torch = name == "device" and type(value).__module__ == "torch"  # which is not imported for this
    if not kinds or of_torch or (not nothing and any(kind.holds(value) for kind in kinds.values())):
        return
    told = f"{value!r:.80}"
    without = f"; leave it out for {name}={default!r:.80}" if nothing or value is None else ""
    if nothing:
        raise ValueError(f"{name}={told} names none{without}.")
    dull = {"None", "NoneType"} | ({"int", "float", "bool"} if "str" in kinds else set())
    dull |= {"str"} if "Path" in kinds or "PathLike" in kinds else set()
    what = list(dict.fromkeys(kind.what for kind_of, kind in kinds.items() if kind_of not in dull))
    if "Literal" in kinds and isinstance(value, str):
        raise ValueError(f"{name}={told} is not {', nor '.join(what)}.")
    if what == [_LIST.what] and isinstance(value, str):
        raise TypeError(f"{name} takes a list of names, e.g. {name}=[{told}].")
    if set(kinds) <= {"bool", "int", "float", "None", "NoneType"}:
        raise TypeError(f"{name}={told} must be {' or '.join(what)}{without}.")
    raise TypeError(f"{name}= takes {', or '.join(what)}; got {type(value).__name__}: {told}{without}.")


def _is_empty(value: object) -> bool:
    return _is_list(value) and hasattr(value, "__len__") and not len(value)  # type: ignore[arg-type]


@functools.cache
def _kinds(annotation: object) -> dict[str, _Kind]:
    """What an annotation allows, by names of types; nothing where one of them is not known here."""
    found = {}
    for part in _parts(annotation):
        name, _, inside = part.partition("[")
        name = name.rpartition(".")[2]
        if name == "Literal":
            words = ast.literal_eval(f"[{inside}")
            found[name] = _Kind(f"one of {', '.join(map(repr, words))}", functools.partial(_is_one_of, words))
            continue
        name = "Axes" if inside == "Axes]" else name
        if name not in _KINDS:
            return {}
        found[name] = _KINDS[name]
    return found


def _is_one_of(words: list, value: object) -> bool:
    return isinstance(value, str | bool | None) and value in words


def _parts(annotation: object) -> list[str]:
    """The members of a union, as text."""
    if get_origin(annotation) in (Union, UnionType):
        return [part for one in get_args(annotation) for part in _parts(one)]
    if not isinstance(annotation, str):
        return [inspect.formatannotation(annotation)]
    node, parts = ast.parse(annotation, mode="eval").body, []
    while isinstance(node, ast.BinOp):
        parts.append(ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *parts[::-1]]


def seed_of(random_state: RandomState) -> int:
    """A seed from what the user gave."""
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if random_state is None:
        return int(np.random.SeedSequence().entropy % 2**31)
    if not isinstance(random_state, int | np.integer) or random_state < 0:
        raise TypeError(f"random_state={random_state!r} must be a non-negative int, a numpy Generator or None.")
    return int(random_state)
