"""What every verb leaves behind can be cut, filtered and brought up to date by mudata and muon, as anybody does."""

import warnings

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from helpers import cite, mudata_of, quiet_mudata
from mudata import MuData

import anvi as av

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import muon as mu
    except ImportError:  # of no extra: it is what others have
        mu = None

KEEP = np.random.default_rng(0).random(300) < 0.8


def filtered(mdata):
    """QC of one modality, as in muon's tutorials."""
    mdata["rna"]._inplace_subset_obs(KEEP)  # as sc.pp.filter_cells does
    mdata.update()


def replaced(mdata):
    """Another object in the place of a modality."""
    mdata.mod["rna"] = mdata["rna"][KEEP].copy()
    mdata.mod["prot"] = mdata["prot"][mdata["prot"].obs_names.isin(mdata["rna"].obs_names)].copy()
    mdata.update()


def subset_then_updated(mdata):
    mdata = mdata[KEEP].copy()
    mdata.update()
    mdata["rna"]._inplace_subset_obs(np.arange(mdata["rna"].n_obs) % 2 > 0)
    mdata.update()
    return mdata


def pushed(mdata):
    mdata.push_obs(common=True, prefixed=False)  # of two copies of a column, mudata wants to be told which
    mdata.pull_obs()
    mdata.push_var()
    mdata.pull_var()


def filtered_globally(mdata):
    mu.pp.filter_obs(mdata, KEEP)


def genes_filtered(mdata):
    mdata["rna"]._inplace_subset_var(np.arange(mdata["rna"].n_vars) % 5 > 0)
    mdata.update()


def more_cells(mdata):
    """A modality with cells that were not there: they have no answer."""
    prot = mdata["prot"]
    extra = prot[:5].copy()
    extra.obs_names = [f"new_{i}" for i in range(5)]
    mdata.mod["prot"] = anndata.concat([prot, extra], join="inner")
    mdata.update()


WAYS = [
    lambda mdata: mdata.update(),
    filtered,
    replaced,
    subset_then_updated,
    lambda mdata: mu.pp.intersect_obs(mdata),
    filtered_globally,
    genes_filtered,
    pushed,
    more_cells,
]
NAMES = "update filter replace subset intersect filter_all filter_genes push_pull more_cells".split()
VERBS = {
    "labelled fit": lambda mdata: None,
    "denoise": lambda mdata: av.tl.denoise(mdata),
    "foreground": lambda mdata: av.tl.foreground(mdata),
    "correlation": lambda mdata: av.tl.feature_correlation(mdata, n_samples=2),
    "sets": lambda mdata: av.tl.predict(mdata, coverage=0.9),
    "markers": lambda mdata: av.tl.differential_expression(mdata, "true_cell_type", n_samples=50),
    "attributions": lambda mdata: av.tl.attributions(mdata, n_cells=5, per_cell=True),
    "criticism": lambda mdata: av.metrics.criticism(mdata, n_samples=2),
    "panels": lambda mdata: av.pp.panels(mdata, "batch"),
    "minify": lambda mdata: av.tl.minify(mdata, keep_counts=True),
}


@pytest.fixture(scope="module")
def after():
    """An object after each verb."""
    fitted = cite(300, labeled_fraction=1.0)
    av.tl.totalanvi(fitted, batch_key="batch", max_epochs=1, train_size=0.7)
    found = {}
    for name, verb in VERBS.items():
        found[name] = fitted.copy()
        verb(found[name])
    found["RNA fit"] = cite(300)
    av.tl.scanvi(found["RNA fit"], batch_key="batch", max_epochs=1)
    found["query"] = cite(300)
    av.tl.map_query(found["query"], fitted, max_epochs=0)
    return found


@pytest.mark.parametrize("verb", [*VERBS, "RNA fit", "query"])
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.filterwarnings("ignore")
def test_mudata_goes_on_after_every_verb(after, verb, way):
    if mu is None and "mu" in way.__code__.co_names:
        pytest.skip("needs muon")
    before = after[verb]
    mdata = before.copy()
    mdata = way(mdata) or mdata
    for slot in before.obsm:
        if slot in before.mod:
            continue
        old, new = (pd.DataFrame(np.asarray(data.obsm[slot]), data.obs_names) for data in (before, mdata))
        pd.testing.assert_frame_equal(new, old.reindex(mdata.obs_names))  # each cell has what it had
    key = "scanvi" if verb == "RNA fit" else "totalanvi"
    table = av.get.proba(mdata, model=key)
    expected = av.get.proba(before, model=key)
    pd.testing.assert_frame_equal(table, expected.reindex(table.index))
    if way is genes_filtered:
        return
    av.tl.latent(mdata[:20].copy() if verb != "minify" else mdata, model=av.get.model(before))  # it can still be asked


def test_tables_of_an_earlier_release_are_read(after):
    """DataFrames in obsm, "/" as "|", and no names beside them."""
    mdata = after["denoise"].copy()
    for slot in ("totalanvi_proba", "totalanvi_prot_denoised"):
        mdata.obsm[slot] = av.get.table(mdata, slot)
        del mdata.uns[f"{slot}_names"]
    pd.testing.assert_frame_equal(av.get.proba(mdata), av.get.proba(after["denoise"]))
    pd.testing.assert_frame_equal(av.get.denoised(mdata), av.get.denoised(after["denoise"]))


def test_a_table_without_its_names_is_told(after):
    mdata = after["sets"].copy()
    mdata.uns["totalanvi_sets_names"] = mdata.uns["totalanvi_sets_names"][1:]
    with pytest.raises(KeyError, match=r"obsm\['totalanvi_sets'\] is an array whose columns have no names"):
        av.get.table(mdata, "totalanvi_sets")
    with pytest.raises(KeyError, match=r"no obsm\['sets'\]; tables there are 'true_protein_rate'"):
        av.get.table(mdata, "sets")


@pytest.mark.parametrize("ending", ["h5mu", "zarr"])
@pytest.mark.filterwarnings("ignore")
def test_names_that_differ_by_a_slash_alone(tmp_path, ending):
    """In the columns of a DataFrame in a file they would be one."""
    mdata = cite(300, missing="zero")
    mdata["prot"].var_names = ["A/B", "A|B", *mdata["prot"].var_names[2:]]
    mdata.update_var()
    mdata.obs["batch"] = mdata.obs["batch"].cat.rename_categories({"batch_0": "x/1", "batch_1": "x|1"})
    mdata.obs["pool/day"] = np.where(np.arange(300) % 2, "a", "b")
    av.pp.panels(mdata, "batch")
    assert av.pl.panels(mdata, show=False, return_fig=True) is not None
    ref, query = mdata[:200].copy(), mdata[200:].copy()
    av.tl.totalvi(ref, batch_key="batch", categorical_covariate_keys=["pool/day"], max_epochs=1)
    av.tl.denoise(ref)
    del query.obs["pool/day"], ref.obs["pool/day"]
    av.tl.map_query(query, ref, max_epochs=0)
    for data in (ref, query):
        path = tmp_path / f"x.{ending}"
        data.write(path) if ending == "h5mu" else data.write_zarr(path)
        back = mudata.read(path) if ending == "h5mu" else mudata.read_zarr(path)
        if data is query:
            continue
        layer = pd.DataFrame(ref["prot"].layers["totalvi_denoised"], ref["prot"].obs_names, ref["prot"].var_names)
        table = av.get.denoised(back, ["A/B", "A|B"]).loc[ref["prot"].obs_names]
        np.testing.assert_array_equal(table, layer[["A/B", "A|B"]])
        assert not np.allclose(table["A/B"], table["A|B"])
        panels = av._data.slots.read_measured(back["prot"])
        assert list(panels) == ["batch_2", "x/1", "x|1"] and not panels["batch_2"].any()
        setup = av.get.model(ref).setup
        for name, row in zip(setup.panels, setup.measured, strict=True):
            np.testing.assert_array_equal(panels[name], row)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.filterwarnings("ignore")
def test_the_advice_on_empty_cells_works_as_it_is_written(layer, alone):
    mdata = cite(300)
    counts = mdata["rna"].X.toarray()
    counts[[3, 9]] = 0
    if layer is None:
        mdata["rna"].X = counts
    else:
        mdata["rna"].layers[layer] = counts
    data, where = (mdata["rna"].copy(), "data") if alone else (mdata, "mdata")
    fit = av.tl.scvi if alone else av.tl.totalanvi
    with pytest.raises(ValueError, match="2 cells without a single count") as told:
        fit(data, max_epochs=1, layer=layer if layer is None or alone else {"rna": layer})
    names = {"sc": sc, "numpy": np, where: data}
    exec(str(told.value).partition("Remove them first: ")[2], names)
    fit(names[where], max_epochs=1, layer=layer if layer is None or alone else {"rna": layer})
    assert names[where].n_obs == 298


def test_a_table_answers_what_a_frame_would_and_is_written_as_an_array(tmp_path):
    mdata = cite(200)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    table, names = mdata.obsm["totalanvi_proba"], mdata.uns["totalanvi"]["classes"]
    assert isinstance(table, np.ndarray) and type(table.to_numpy()) is np.ndarray
    np.testing.assert_array_equal(table.to_numpy(), av.get.proba(mdata))
    assert list(table.columns) == list(names) and list(table[:5].columns) == list(names)
    assert table[:, :2].columns is None and table[:, ::-1].columns is None and table.T.columns is None
    assert list(table.copy().columns) == list(names) and not hasattr(table.sum(), "loc")
    with quiet_mudata():
        mdata.write(tmp_path / "a.h5mu")
        mdata.write_zarr(tmp_path / "a.zarr")
        for back in (mudata.read(tmp_path / "a.h5mu"), mudata.read_zarr(tmp_path / "a.zarr"), mdata.copy()):
            np.testing.assert_array_equal(back.obsm["totalanvi_proba"], table)
            np.testing.assert_array_equal(av.get.proba(back), av.get.proba(mdata))


@pytest.mark.parametrize("n_empty", [1, 30])
@pytest.mark.filterwarnings("ignore")
def test_the_advice_on_empty_cells_leaves_those_that_have_proteins_alone(n_empty):
    whole = av.datasets.synthetic_cite(300, n_genes=60, n_panels=1, rna_only_batch=False)
    rna = whole["rna"][:250].copy()
    counts = rna.X.toarray()
    counts[:n_empty] = 0
    rna.X = counts
    mdata = mudata_of({"rna": rna, "prot": whole["prot"].copy()}, like=whole)
    with pytest.raises(ValueError, match=f"{n_empty} cells without a single count") as told:
        av.tl.totalanvi(mdata, max_epochs=1)
    names = {"numpy": np, "mdata": mdata}
    exec(str(told.value).partition("Remove them first: ")[2], names)
    assert names["mdata"].n_obs == 300 - n_empty and av.pp.check(names["mdata"]).ok


def test_minified_objects_that_were_joined_are_told_what_they_lack():
    mdata = cite(200)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    minified = av.tl.minify(mdata, copy=True)
    joined = mudata_of(
        {name: anndata.concat([part[:70], part[70:]]) for name, part in minified.mod.items()}, like=minified
    )
    joined.obsm.update({key: value for key, value in minified.obsm.items() if key.startswith("totalanvi_q")})
    with pytest.raises(ValueError, match="If they were minified") as told:
        av.tl.predict(joined, model=av.get.model(mdata))
    exec(str(told.value).partition("give it back: ")[2], {"mdata": joined, "minified": minified, "key": "totalanvi"})
    av.tl.predict(joined)
    assert np.array_equal(av.get.proba(joined).loc[minified.obs_names], av.get.proba(minified))


def test_an_index_that_was_lost_is_told_and_the_advice_gives_it_back():
    mdata = cite(200)
    donors = pd.DataFrame({"batch": ["batch_0", "batch_1", "batch_2"], "donor": ["a", "b", "a"]})
    mdata.obs = mdata.obs.merge(donors, on="batch", how="left")
    for verb in (av.tl.totalvi, av.tl.totalanvi):
        with pytest.raises(ValueError, match="mdata.obs has no row for 200 of the 200 cells") as told:
            verb(mdata, batch_key="batch", max_epochs=1)
    assert av.pp.check(mdata, batch_key="batch").problems == [str(told.value)]
    exec(str(told.value).partition("names back: ")[2].rstrip("."), {"mdata": mdata})
    assert av.pp.check(mdata, batch_key="batch").ok


def test_a_modality_that_came_without_an_update_is_told():
    whole = cite(200)
    mdata = mudata_of({"rna": whole["rna"][:150].copy()}, like=whole)
    mdata.mod["prot"] = whole["prot"].copy()
    with pytest.raises(ValueError, match=r"no row for .* cells .*mdata.update\(\) adds them"):
        av.tl.totalvi(mdata, max_epochs=1)


def test_features_that_are_shared_are_no_cells():
    rna = cite(100)["rna"]
    with quiet_mudata(), pytest.raises(ValueError, match="cells must be shared"):
        av.tl.scvi(MuData({"a": rna[:50].copy(), "rna": rna[50:].copy()}, axis=1), max_epochs=1)


def test_cells_of_other_modalities_are_told(caplog):
    whole = cite(200)
    names = [*whole.obs_names[:50], *(f"tcr_{i}" for i in range(40))]
    mods = dict(whole.mod) | {"airr": AnnData(obs=pd.DataFrame({"chain": "TRA"}, index=names))}
    mdata = mudata_of(mods, like=whole)
    told = "40 of the 240 cells are not in mdata['rna'] or mdata['prot'] (first: 'tcr_0')"
    (note,) = [note for note in av.pp.check(mdata).notes if told in note]
    av.tl.totalvi(mdata, max_epochs=1)
    assert note in caplog.messages
    code = {"mdata": mdata}
    exec(note.partition("leave them out: ")[2], code)
    assert not [note for note in av.pp.check(code["mdata"]).notes if "are not in" in note]


@pytest.mark.filterwarnings("ignore")
def test_no_protein_is_left():
    mdata, reference = cite(200), cite(200)
    mdata = mdata[:, mdata["rna"].var_names].copy()
    with pytest.raises(ValueError, match="No protein was measured in any cell of mdata..prot..*tl.scvi"):
        av.tl.totalvi(mdata, max_epochs=1)
    assert "No protein was measured" in av.pp.check(mdata).problems[0]
    av.tl.totalanvi(reference, batch_key="batch", max_epochs=1)
    without = MuData({"rna": mdata["rna"].copy()})
    for query in (mdata, without):
        query.obs["batch"] = reference.obs["batch"]
        av.tl.predict(query, model=av.get.model(reference))
    assert np.array_equal(*(np.asarray(query.obsm["totalanvi_proba"]) for query in (mdata, without)))


@pytest.mark.filterwarnings("ignore")
def test_views_of_objects_in_files_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    cite(200).write(tmp_path / "counts.h5mu")
    cite(200)["rna"].write(tmp_path / "counts.h5ad")
    backed = mudata.read_h5mu(tmp_path / "counts.h5mu", backed="r")
    keep = (backed.obs["batch"] != "batch_2").to_numpy()
    epochs: list = []
    with pytest.raises(ValueError, match="view of an object that stays in its file.*open_backed") as told:
        av.tl.totalvi(backed[keep], max_epochs=1, callback=epochs.append)
    whole = eval(str(told.value).partition("open the file by ")[2].partition(", and cut")[0], {"av": av})
    data = anndata.read_h5ad(tmp_path / "counts.h5ad", backed="r")[:150]
    with pytest.raises(ValueError, match="view of an object that stays in its file") as told:
        av.tl.scvi(data, max_epochs=1, callback=epochs.append)
    assert not epochs
    names = {"data": data}
    exec(str(told.value).partition("written to it: ")[2].rstrip("."), names)
    for one, verb in ((whole[keep], av.tl.totalvi), (names["data"], av.tl.scvi)):
        verb(one, max_epochs=1, n_hidden=8)
        assert one.n_obs == one.obsm[f"X_{verb.__name__}"].shape[0]


def test_an_index_that_was_changed_beside_a_table_is_told_before_anything_is_trained():
    rna = cite(200)["rna"]
    data = AnnData(rna.X.copy(), obs=pd.DataFrame({"cell_type": ["A", "B"] * 100}, index=rna.obs_names))
    data.obsm["mine"] = pd.DataFrame({"x": 1.0}, index=data.obs_names)
    old, names, epochs = data.obs_names, "s1_" + data.obs_names, []
    data.obs.index = names
    with pytest.raises(ValueError, match=r"data.obs has another index than .* data.obsm .*obs_names = names"):
        av.tl.scanvi(data, max_epochs=1, callback=epochs.append)
    assert not epochs
    data.obs.index = old
    data.obs_names = names
    av.tl.scanvi(data, max_epochs=1)
    assert data.obs_names[0].startswith("s1_") and data.obsm["mine"].index.equals(data.obs_names)


@pytest.mark.filterwarnings("ignore")
def test_the_names_that_come_back_are_those_of_the_rows():
    whole = cite(200)
    mdata = mudata_of({"prot": whole["prot"].copy(), "rna": whole["rna"][::-1].copy()}, like=whole)
    mdata.obs["truth"] = mdata.obs_names
    mdata.obs = mdata.obs.reset_index(drop=True)
    with pytest.raises(ValueError, match="mdata.obs has no row for 200 of the 200 cells") as told:
        av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    exec(str(told.value).partition("names back: ")[2].rstrip("."), {"mdata": mdata})
    assert mdata.obs["truth"].eq(mdata.obs_names).all()
    parts = mudata_of({"rna": whole["rna"][:150].copy(), "prot": whole["prot"][100:].copy()}, like=whole)
    parts.obs = parts.obs.reset_index(drop=True)
    with pytest.raises(ValueError, match="give the names back.$"):  # no modality has all
        av.tl.totalvi(parts, max_epochs=1)


def test_cells_without_rna_are_no_matter_to_a_model_of_rna(caplog):
    whole = cite(200)
    mdata = mudata_of({"rna": whole["rna"][:150].copy(), "prot": whole["prot"].copy()}, like=whole)
    av.tl.scvi(mdata, max_epochs=1)
    assert not [message for message in caplog.messages if "are not in" in message]
