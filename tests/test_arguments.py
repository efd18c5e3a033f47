"""Arguments of a wrong kind are refused by every public function, by name, before anything is read or trained."""

import inspect
from typing import Literal, Union

import numpy as np
import pandas as pd
import pytest
import torch

import anvi as av
from anvi._arguments import _kinds, check_argument

ROOMS = ("tl", "pl", "pp", "get", "metrics", "io", "datasets")
OURS = [
    (f"{room}.{name}", function)
    for room in ROOMS
    for name, function in vars(getattr(av, room)).items()
    if inspect.isfunction(function) and not name.startswith("_") and function.__module__.startswith("anvi.")
    if room in ("get", "datasets") or name in getattr(av, room).__all__
    if room not in ("get", "datasets") or function.__module__ == f"anvi.{room}"
]
ARGUMENTS = [
    pytest.param(function, parameter, id=f"{name}-{parameter.name}")
    for name, function in OURS
    for parameter in inspect.signature(function).parameters.values()
    if parameter.kind is not parameter.VAR_KEYWORD and _kinds(parameter.annotation)
]


def call(function, parameter, value):
    """Call with one argument, and None for the others that must be there: nothing of them is looked at before."""
    others = inspect.signature(function).parameters.values()
    needed = {one.name: None for one in others if one.default is one.empty and one.kind is not one.VAR_KEYWORD}
    known = {name: "x" for name in needed if _kinds(inspect.signature(function).parameters[name].annotation)}
    return function(**(needed | known | {parameter.name: value}))


def test_every_room_is_looked_through():
    assert len(OURS) > 45 and len(ARGUMENTS) > 400
    assert {name.partition(".")[0] for name, _ in OURS} == set(ROOMS)


@pytest.mark.parametrize(("function", "parameter"), ARGUMENTS)
def test_what_is_nothing_of_its_kind_is_refused_by_name(function, parameter):
    with pytest.raises(TypeError, match=rf"^{parameter.name}(=| takes)"):
        call(function, parameter, object())


@pytest.mark.parametrize(
    ("function", "parameter"),
    [one for one in ARGUMENTS if "Sequence" in _kinds(one.values[1].annotation) and one.values[1].default != ()],
)
def test_no_names_at_all_are_refused_by_name(function, parameter):
    with pytest.raises(ValueError, match=rf"^{parameter.name}=\[\] names none; leave it out for {parameter.name}="):
        call(function, parameter, [])


@pytest.mark.parametrize(
    ("function", "parameter"),
    [one for one in ARGUMENTS if _kinds(one.values[1].annotation).keys() <= {"Sequence", "list", "None", "NoneType"}],
)
def test_one_name_in_place_of_a_list_is_refused(function, parameter):
    """It would be taken for its letters."""
    with pytest.raises(TypeError, match=rf"^{parameter.name} takes a list of names, e\.g\. {parameter.name}=\['B'\]"):
        call(function, parameter, "B")


NAMES = {"list": ["B"], "tuple": ("B",), "Index": pd.Index(["B"]), "array": np.array(["B"]), "set": {"B"}}


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        ("bool", True),
        ("bool", np.bool_(False)),
        (bool | None, None),
        ("int", 3),
        ("int", np.int64(3)),
        ("int", np.array(3)),
        ("float", 3),
        ("float | None", np.float32(0.5)),
        ("str", np.str_("B")),
        ("str | Path", "x"),
        ("str | os.PathLike[str] | None", av.settings.__class__.__module__),
        ("float | Literal['observed', 'latent']", "latent"),
        (Literal["a", "b"] | float, 2.0),
        (Union[Literal["auto"], list[str]], ["x"]),  # noqa: UP007
        ("Mapping[str, np.ndarray | Sequence[bool] | str]", {"a": [True]}),
        ("list[str] | None", []),
        ("str | Sequence[str]", (name for name in "ab")),
        ("Unknown | str", 3),
        *(("Sequence[str] | None", value) for value in NAMES.values()),
    ],
)
def test_what_is_of_its_kind_passes(annotation, value):
    check_argument("x", value, annotation)


@pytest.mark.parametrize(
    ("annotation", "value", "error", "message"),
    [
        ("bool", "pred", TypeError, "x='pred' must be True or False."),
        ("bool", None, TypeError, "x=None must be True or False; leave it out for x="),
        ("bool", 1, TypeError, "x=1 must be True or False."),
        ("str | None", 3, TypeError, "x= takes one name, a str; got int: 3."),
        ("str", ["B"], TypeError, r"x= takes one name, a str; got list: ['B']."),
        ("float", "a", TypeError, "x='a' must be a number."),
        ("int | None", True, TypeError, "x=True must be a whole number."),
        ("float", np.bool_(True), TypeError, "must be a number"),
        (float, [1.0], TypeError, "x=[1.0] must be a number."),
        ("Sequence[str]", "B", TypeError, "x takes a list of names, e.g. x=['B']."),
        ("Sequence[str]", 3, TypeError, "x= takes a list of names; got int: 3."),
        ("list[str]", {"B": 1}, TypeError, "x= takes a list of names; got dict"),
        ("str | int | bool | Sequence[str]", None, TypeError, "x= takes one name, a str, or a list of names; got None"),
        ("str | Path", 3, TypeError, "got int: 3."),
        (
            "Axes | Sequence[Axes] | None",
            [3],
            TypeError,
            "x= takes Axes of matplotlib; got list: [3]",
        ),
        ("Literal['auto', 'nan']", "zeros", ValueError, "x='zeros' is not one of 'auto', 'nan'."),
        ("float | Literal['scvi'] | None", "a", ValueError, "x='a' is not a number, nor one of 'scvi'."),
        ("Literal['volcano', 'dot']", 3, TypeError, "x= takes one of 'volcano', 'dot'; got int: 3."),
    ],
)
def test_what_is_said(annotation, value, error, message):
    with pytest.raises(error) as told:
        check_argument("x", value, annotation)
    assert message in str(told.value)


# what no annotation says --------------------------------------------------------------------------------------------


T = {"model": "totalanvi"}
NEVER = pytest.mark.usefixtures("no_training")


@NEVER
@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda m: av.pl.confusion(m, **T, normalize="pred"), TypeError, "normalize='pred' must be True or False"),
        (lambda m: av.pl.confusion(m, **T, ax=3), TypeError, "ax= takes Axes of matplotlib; got int: 3"),
        (lambda m: av.pl.history(m, **T, ax=[3] * 9), TypeError, "ax= takes Axes of matplotlib; got list"),
        (lambda m: av.pl.history(m, **T, terms=3), TypeError, "terms= takes one name, a str, or a list of names"),
        (lambda m: av.pl.foreground(m, **T, proteins=[]), ValueError, "proteins=[] names none"),
        (lambda m: av.pl.embedding(m, "totalanvi", layer="nope"), KeyError, "layer='nope' is nowhere; there are: "),
        (lambda m: av.pl.embedding(m, "totalanvi", layer={"rna": "no"}), KeyError, "layer='no' is nowhere"),
        (lambda m: av.pl.differential_expression(m, n_features=0), ValueError, "n_features=0 must be a whole number"),
        (lambda m: av.pl.differential_expression(m, n_features=-1), ValueError, "n_features=-1 must be a whole"),
        (lambda m: av.pl.differential_expression(m, n_features=2.5), ValueError, "n_features=2.5 must be a whole"),
        (lambda m: av.get.de(m, []), ValueError, "group=[] names none"),
        (lambda m: av.pp.panels(m, missing="zeros"), ValueError, "missing='zeros' is not one of 'auto', 'nan'"),
        (lambda m: av.tl.differential_expression(m, "cell_type", groups=[]), ValueError, "groups=[] names none"),
        (lambda m: av.tl.differential_expression(m, "cell_type", delta="a"), TypeError, "delta='a' must be a number"),
        (lambda m: av.metrics.novelty(m, **T, classes=[]), ValueError, "classes=[] names none"),
        (lambda m: av.metrics.novelty(m, **T, classes="NK"), TypeError, "classes takes a list of names, e.g. classes="),
        (lambda m: av.metrics.novelty(m, **T, classes=3), TypeError, "classes= takes a list of names; got int: 3"),
        (lambda m: av.metrics.novelty(m, **T, classes=[3]), KeyError, "classes: '3' is no class of the model"),
        (lambda m: av.metrics.criticism(m, **T, groupby="no", metrics=["cv"]), KeyError, "groupby='no' was found in n"),
        (lambda m: av.metrics.criticism(m, **T, level="nope"), KeyError, "level='nope' is no level of the labels"),
        (lambda m: av.pp.align_query(m, m, **T, min_genes=50), ValueError, "min_genes=50 is a share and must be"),
        (lambda m: av.pp.align_query(m, m, **T, min_genes=-1), ValueError, "min_genes=-1 is a share and must be"),
        (lambda m: av.pp.align_query(m, m, **T, min_genes="a"), TypeError, "min_genes='a' must be a number"),
        (lambda m: av.io.model_card(m, key="scvi", license=3), TypeError, "license= takes one name, a str; got int"),
        (lambda m: av.io.model_card(m, key="scvi", training_data_url=3), TypeError, "training_data_url= takes one"),
        (lambda m: av.tl.scvi(m, checkpoint=".", copy=True), ValueError, "checkpoint='.' is a folder: name a file in"),
        (lambda m: av.tl.totalanvi(m, rna_mod=None), TypeError, "rna_mod= takes one name, a str; got NoneType"),
    ],
)
def test_wrong_arguments_are_told_before_they_do_anything(_fitted, ask, error, message):
    with pytest.raises(error) as told:
        ask(_fitted)
    assert message in str(told.value)


def test_a_model_is_written_over_by_a_switch_only(_fitted, tmp_path):
    av.write_model(_fitted, tmp_path / "model", model="scvi")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(TypeError, match="overwrite='no' must be True or False"):
        av.write_model(_fitted, tmp_path / "model", model="totalvi", overwrite="no")
    with pytest.raises(TypeError, match="card= takes one name, a str; got int: 3"):
        av.write_model(_fitted, tmp_path / "model", model="totalvi", card=3, overwrite=True)
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def ranked(mdata):
    """The object with a ranking of both modalities."""
    av.tl.differential_expression(mdata, "cell_type", **T, n_samples=10)
    return mdata


def test_names_may_be_numbers_and_arrays(fitted):
    """Clusters are numbers: what names one is a number, too."""
    fitted.obs["cluster"] = np.arange(fitted.n_obs) % 3
    table = av.tl.differential_expression(
        fitted, "cluster", groups=[np.int64(0), 1], reference=2, **T, n_samples=10, inplace=False
    )
    assert set(table["rna"]["group"]) == {"0", "1"}
    table = av.tl.differential_expression(
        fitted, "cluster", groups=0, reference=np.int64(2), **T, n_samples=10, inplace=False
    )
    assert set(table["rna"]["group"]) == {"0"}
    av.tl.foreground(fitted, **T)
    assert len(av.pl.foreground(fitted, **T, proteins=(name for name in ("P01", "P02")))) == 2
    assert len(av.pl.history(fitted, **T, terms=np.array(["loss", "elbo"]))) == 2
    assert set(av.get.de(ranked(fitted), (name for name in ("B", "NK")))["group"]) == {"B", "NK"}
    by_list, by_array = (
        av.tl.denoise(fitted, **T, features=names) for names in (["G001", "P01"], np.array(["G001", "P01"]))
    )
    pd.testing.assert_frame_equal(by_list, by_array)


def test_what_is_right_is_not_written_out():
    """The text of an object takes long, and may not be had at all."""

    class Silent(list):
        def __repr__(self):
            raise RuntimeError("asked")

    check_argument("x", Silent("ab"), "Sequence[str]")


@pytest.mark.parametrize("device", ["gpu", 3, None])
def test_a_setting_that_is_no_device_is_refused_when_it_is_set(device):
    before = av.settings.device
    with pytest.raises(ValueError, match=rf"settings\.device='?{device}'? is not a torch device; use 'auto'"):
        av.settings.device = device
    with pytest.raises(ValueError, match="is not a torch device"), av.settings.override(device=device):
        pass
    assert av.settings.device == before


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one")
def test_mps_where_there_is_none(_fitted):
    with pytest.raises(ValueError, match="device='mps' was asked for, but torch sees no MPS device here"):
        av.tl.latent(_fitted, model="scvi", device="mps", inplace=False)


def test_a_device_of_torch_is_a_device(_fitted):
    by_name, by_device = (
        av.tl.latent(_fitted, model="scvi", device=device, inplace=False) for device in ("cpu", torch.device("cpu"))
    )
    np.testing.assert_array_equal(by_name, by_device)


@pytest.mark.parametrize(
    ("seed", "message"), [(-1, "random_state=-1 must be a non-neg"), ("a", "random_state= takes a")]
)
def test_seeds_of_made_data_are_those_of_fits(seed, message):
    with pytest.raises(TypeError, match=message):
        av.datasets.synthetic_cite(300, n_genes=60, random_state=seed)


def test_a_class_called_overall_has_a_row_of_its_own(fitted):
    fitted.obs["true"] = np.where(np.arange(fitted.n_obs) % 2, "overall", "B")
    fitted.obs["guess"] = "overall"
    table = av.metrics.classification(fitted, "true", prediction="guess", split=None)
    assert list(table.index) == ["overall", "B", "overall (class)"]
    assert table.loc["overall (class)", "recall"] == 1 and table.loc["overall", "cells"] == fitted.n_obs


@pytest.mark.parametrize("bound", [av.metrics.elbo, av.metrics.marginal_likelihood])
def test_bounds_say_how_to_do_without_labels(fitted, bound):
    del fitted.obs["cell_type"]
    with pytest.raises(KeyError, match="labels of the fit, 'cell_type', are not in this object; use_labels=False does"):
        bound(fitted, **T, n_samples=2, use_labels=True)
    assert bound(fitted, **T, n_samples=2, use_labels=False)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda data: av.tl.latent(data, indices=[0]),
            "'indices': ask about some cells by data.cells.; there are data",
        ),
        (lambda data: av.tl.denoise(data, gene_list=["G001"]), "'gene_list': name them: features=; there are"),
        (lambda data: av.tl.latent(data, gene_list=["G001"]), "'gene_list': there are data, model"),
        (lambda data: av.tl.predict(data, sofft=True), "'sofft': did you mean soft=."),
        (lambda data: av.pl.embedding(data, use_rep="x"), "'use_rep': it is basis="),
        (lambda data: av.tl.differential_expression(data, group1="B"), "'group1': name the group: groups="),
    ],
)
def test_arguments_of_other_packages(_fitted, ask, message):
    with pytest.raises(TypeError, match=f"There is no argument {message}"):
        ask(_fitted)
