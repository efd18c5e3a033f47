"""Cells with proteins and without RNA: in fits, mapped, in files; what stands in place of their RNA counts nowhere."""

from dataclasses import replace

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import quiet_mudata, without_rna
from sklearn.metrics import roc_auc_score

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit.plan import Plan
from anvi._fit.start import make_config, make_network
from anvi._fit.step import augment
from anvi._posterior import encode
from anvi.nn import Draws, Weights, loss


def mosaic(n: int = 1_200, alone: str | None = "batch_1", **options):
    """Simulated cells of which one batch has proteins and no RNA, and no labels; and the truth."""
    whole = av.datasets.synthetic_cite(n, n_genes=80, n_batches=3, **options)  # batch_2 has RNA only
    gone = whole.obs_names[whole.obs["batch"] == alone]
    return without_rna(whole, gone), whole


@pytest.fixture(scope="module")
def _fitted():
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata, whole = mosaic()
        av.tl.totalanvi(mdata, "known", batch_key="batch", max_epochs=40, train_size=0.75)
    return mdata, whole


@pytest.fixture
def fitted(_fitted):
    return _fitted[0].copy(), _fitted[1]


def alone_in(mdata) -> np.ndarray:
    return ~mdata.obs_names.isin(mdata["rna"].obs_names)


# reading ------------------------------------------------------------------------------------------------------------


def test_they_are_read_with_the_library_of_their_batch():
    whole = av.datasets.synthetic_cite(300, n_genes=60, n_batches=3)
    gone = [*whole.obs_names[whole.obs["batch"] == "batch_0"][:40], *whole.obs_names[whole.obs["batch"] == "batch_1"]]
    mdata = without_rna(whole, gone)
    setup = find_setup(mdata, proteins=True, batch_key="batch")
    cells = read_cells(mdata, setup)
    assert set(cells.names) == set(whole.obs_names)
    np.testing.assert_array_equal(cells.has_rna, ~np.isin(cells.names, gone))
    counts = pd.Series(np.asarray(mdata["rna"].X.sum(1)).ravel(), mdata["rna"].obs_names)
    log_library = pd.Series(cells.log_library.squeeze(1).numpy(), cells.names)
    batch = whole.obs["batch"].astype(str)
    for name in cells.names[:60]:
        if name in counts:
            expected = np.log(counts[name])
        elif batch[name] == "batch_1":  # of the other batches, each counting once
            means = [np.log(counts[batch[counts.index] == other]).mean() for other in ("batch_0", "batch_2")]
            expected = np.mean(means)
        else:
            expected = np.log(counts[batch[counts.index] == batch[name]]).mean()
        assert log_library[name] == pytest.approx(expected, rel=1e-5), name
    pair = take(cells, torch.tensor([int((~cells.has_rna).nonzero()[0]), int(cells.has_rna.nonzero()[0])]))
    assert (pair.x[0] == 0).all() and (pair.x[1] > 0).any() and (pair.entries.row == 1).all()
    assert pair.has_rna.tolist() == [False, True]


def test_data_in_which_all_have_rna_are_read_as_ever():
    cells = read_cells(*_read(av.datasets.synthetic_cite(300, n_genes=60)))
    assert cells.has_rna is None and take(cells, torch.arange(3)).has_rna is None
    assert Plan().for_cells(100, warm_start=False).hide_rna == 0
    assert Plan().for_cells(100, warm_start=False, without_rna=True).hide_rna == 0.5


def _read(mdata):
    return mdata, find_setup(mdata, proteins=True, batch_key="batch", labels_key="cell_type")


# the loss -----------------------------------------------------------------------------------------------------------


def prepared(dtype=torch.float64, **options):
    mdata, _ = mosaic(240)
    setup = find_setup(mdata, proteins=True, batch_key="batch", labels_key="known")
    cells = read_cells(mdata, setup, labels=True)
    network = make_network(make_config("totalanvi", setup, {"n_hidden": 16} | options), cells, 0).to(dtype)
    index = torch.cat([(~cells.has_rna).nonzero()[:9, 0], cells.has_rna.nonzero()[:9, 0]])
    index = index[torch.argsort((cells.label[index] < 0).long(), stable=True)]
    batch = take(cells, index, n_labelled=int((cells.label[index] >= 0).sum()))
    as_dtype = {name: getattr(batch, name).to(dtype) for name in ("x", "y", "log_library", "weight")}
    return network, batch._replace(**as_dtype, entries=None), cells


def objective(network, batch, seed=0):
    terms = network.terms(batch, None, Draws(torch.Generator().manual_seed(seed)))
    value = loss(terms, batch.weight, Weights(), network.config)
    network.zero_grad()
    value.backward()
    return terms, value, [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", [{}, {"library": "latent"}, {"gene_likelihood": "zinb"}], ids=str)
def test_what_stands_in_place_of_rna_counts_nowhere(options):
    network, batch, _ = prepared(**options)
    terms, value, gradients = objective(network, batch)
    assert (terms.reconstruction_rna[~batch.has_rna] == 0).all() and (terms.reconstruction_rna[batch.has_rna] > 0).all()
    if terms.kl_library is not None:
        torch.testing.assert_close(terms.kl_library[~batch.has_rna], torch.zeros(9, dtype=torch.float64))
    garbage = torch.where(batch.has_rna[:, None], batch.x, torch.randint(0, 50, batch.x.shape).double())
    other_terms, other, others = objective(network, batch._replace(x=garbage))
    torch.testing.assert_close(other, value, rtol=1e-12, atol=0)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
    # and is not left out of anything else: without the mask it counts
    assert not torch.isclose(objective(network, batch._replace(x=garbage, has_rna=None))[1], value)


def test_the_bound_is_that_of_the_proteins_alone():
    network, batch, _ = prepared()
    terms, *_ = objective(network, batch)
    cell = int((~batch.has_rna).nonzero()[0])
    without = [terms.reconstruction_protein, terms.kl_z, terms.kl_u, terms.kl_label, terms.kl_background]
    from anvi.nn import negative_elbo

    torch.testing.assert_close(negative_elbo(terms)[cell], sum(part[cell] for part in without))


def test_decoder_rows_of_a_batch_without_rna_get_no_gradient():
    network, batch, cells = prepared(use_batch_norm="none")
    objective(network, batch)
    code = int(cells.batch[~cells.has_rna][0])
    for name, parameter in network.rna.named_parameters():
        if name.endswith("covariates"):
            assert (parameter.grad[code] == 0).all() and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("dense", [True, False])
def test_rna_is_hidden_from_some_cells_and_never_all(dense):
    _, batch, cells = prepared(torch.float32)
    many = take(cells, torch.arange(len(cells)), dense=dense)
    shown = [
        augment(
            [many],
            cells.x.n_columns,
            torch.Generator().manual_seed(seed),
            hide_proteins=0.5,
            thin_counts=0.5,
            hide_rna=0.5,
        )[0]
        for seed in range(20)
    ]
    shares = []
    assert not many.has_rna.all()
    for hidden in shown:
        counts = torch.zeros(len(cells)).index_add_(0, hidden.seen.row, hidden.seen.count)
        blind = counts == 0
        assert not (blind & ~hidden.shown.any(1)).any()
        with_proteins = hidden.shown.any(1) & hidden.has_rna
        shares.append(float(blind[with_proteins].float().mean()))
        assert hidden.entries.count.sum() == many.entries.count.sum()  # the likelihood explains all
    # 20 draws of about 40 cells
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


# fits ---------------------------------------------------------------------------------------------------------------


def test_their_types_are_found(fitted):
    mdata, whole = fitted
    truth = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    alone, right = alone_in(mdata), mdata.obs["totalanvi_prediction"].astype(str) == truth
    assert alone.sum() == 400
    chance = truth[alone].value_counts(normalize=True).max()
    assert right[alone].mean() > chance + 0.4 and right[~alone].mean() > 0.9
    assert set(mdata.uns["totalanvi"]["params"]["temperature"]) == set(encode.KINDS)
    assert set(mdata.uns["totalanvi"]["calibration"]["cells_seen"]) == set(encode.KINDS)
    assert np.isfinite(mdata.obsm["X_totalanvi"]).all() and np.isfinite(mdata.obs["totalanvi_novelty"]).all()
    assert mdata.uns["totalanvi"]["params"]["hide_rna"] == 0.5


def test_shuffled_proteins_tell_nothing(fitted):
    mdata, whole = fitted
    alone = alone_in(mdata)
    rng = np.random.default_rng(0)
    names = mdata.obs_names[alone]
    rows = mdata["prot"].obs_names.get_indexer(names)
    x = np.asarray(mdata["prot"].X.todense() if hasattr(mdata["prot"].X, "todense") else mdata["prot"].X).copy()
    x[rows] = x[rng.permutation(rows)]
    mdata["prot"].X = x
    truth = whole.obs["true_cell_type"].astype(str).reindex(names)
    found = av.tl.predict(mdata, soft=False, inplace=False).loc[names].astype(str)
    assert (found == truth).mean() < truth.value_counts(normalize=True).max() + 0.1


def test_where_joint_cells_lie_does_not_hang_on_them(fitted):
    mdata, whole = fitted
    model = av.get.model(mdata)
    names = mdata["rna"].obs_names
    with quiet_mudata():
        joint = mdata[names].copy()
    there = pd.DataFrame(av.tl.latent(mdata, inplace=False), mdata.obs_names).loc[joint.obs_names]
    np.testing.assert_array_equal(av.tl.latent(joint, model=model, inplace=False), there)
    # and the same cells, when their RNA is given back, lie where RNA-and-protein cells do
    with quiet_mudata():
        back = whole[mdata.obs_names[alone_in(mdata)]].copy()
    truth = back.obs["true_cell_type"].astype(str)
    proba = av.tl.predict(back, model=model, inplace=False)
    alone = av.get.proba(mdata).loc[back.obs_names]
    assert (proba.idxmax(axis=1) == truth).mean() > (alone.idxmax(axis=1) == truth).mean() - 0.02


def test_their_rna_is_imputed(fitted):
    mdata, whole = fitted
    found = av.tl.denoise(mdata, inplace=False)
    alone = alone_in(mdata)
    assert np.isfinite(found["rna"]).all() and np.isfinite(found["prot"]).all()
    rna = found["rna"].to_pandas()
    truth = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    markers = whole["rna"].varm["true_markers"]
    scores = [
        roc_auc_score(truth[alone] == name, np.log(rna.loc[alone, markers.index[markers[name]]] + 1e-9).mean(axis=1))
        for name in markers
    ]
    assert np.mean(scores) > 0.9
    av.tl.denoise(mdata)
    table = mdata.obsm["totalanvi_rna_denoised"]
    np.testing.assert_array_equal(table, rna)
    np.testing.assert_allclose(av.get.denoised(mdata, list(rna.columns)), rna)


def test_a_batch_without_rna_is_decoded_as_one_like_the_others(fitted):
    mdata, _ = fitted
    model = av.get.model(mdata)
    code = model.setup.batches.index("batch_1")
    for name, table in model.network.rna.named_parameters():
        if name.endswith("covariates"):
            others = [i for i in range(3) if i != code]
            torch.testing.assert_close(table[code], table[others].mean(0))


def test_every_question_is_answered(fitted):
    mdata, _ = fitted
    alone = alone_in(mdata)
    draws = av.tl.posterior_predictive(mdata)
    assert np.isfinite(draws["rna"]).all()
    sizes = av.get.library_size(mdata)
    assert sizes.notna().all() and sizes[alone].nunique() == 1
    table = av.metrics.elbo(mdata, per_cell=True)
    assert table.notna().all().all()
    errors = av.metrics.reconstruction_error(mdata, per_cell=True)
    assert errors["rna"][alone].isna().all() and errors["rna"][~alone].notna().all()
    av.tl.predict(mdata, coverage=0.9)
    av.tl.foreground(mdata)
    av.tl.differential_expression(mdata, "totalanvi_prediction")
    av.metrics.marginal_likelihood(mdata, n_samples=3)


def test_files_and_minified_data(fitted, tmp_path):
    mdata, _ = fitted
    before = av.tl.predict(mdata, inplace=False)
    rna = av.tl.denoise(mdata, inplace=False)["rna"]
    small = av.tl.minify(mdata, copy=True)
    with quiet_mudata():
        for name, part in (("whole", mdata), ("small", small)):
            part.write_h5mu(tmp_path / f"{name}.h5mu")
            back = mudata.read_h5mu(tmp_path / f"{name}.h5mu")
            assert not back["rna"].obs_names.isin(mdata.obs_names[alone_in(mdata)]).any()
            pd.testing.assert_frame_equal(av.tl.predict(back, inplace=False), before.loc[back.obs_names])
            np.testing.assert_array_equal(av.tl.denoise(back, inplace=False)["rna"], rna.sel(obs=list(back.obs_names)))
    av.write_model(mdata, tmp_path / "model")
    pd.testing.assert_frame_equal(av.tl.predict(mdata, model=av.read_model(tmp_path / "model"), inplace=False), before)


# mapping ------------------------------------------------------------------------------------------------------------


def query_of(whole, how: str):
    """A new batch of proteins alone: beside an RNA modality without its cells, or with nothing else."""
    new = whole.obs_names[whole.obs["batch"] == "batch_1"]
    prot = whole["prot"][whole["prot"].obs_names.isin(new)].copy()
    parts = {"prot": prot} | ({"rna": whole["rna"][:0].copy()} if how == "empty" else {})
    with quiet_mudata():
        query = mudata.MuData(parts)
    query.obs["batch"] = "new"
    return query


@pytest.mark.parametrize("how", ["empty", "proteins only"])
def test_a_query_of_proteins_alone_is_mapped(fitted, how):
    mdata, whole = fitted
    query = query_of(whole, how)
    av.tl.map_query(query, mdata, max_epochs=2)
    truth = whole.obs["true_cell_type"].astype(str).reindex(query.obs_names)
    chance = truth.value_counts(normalize=True).max()
    assert (query.obs["totalanvi_prediction"].astype(str) == truth).mean() > chance + 0.3
    found = av.tl.denoise(query, inplace=False)
    assert np.isfinite(found["rna"]).all() and found["rna"].shape == (query.n_obs, 80)
    model = av.get.model(query)
    assert model.setup.log_library[model.setup.batches.index("new")] == pytest.approx(
        np.mean(av.get.model(mdata).setup.log_library)
    )
    again = av.tl.predict(query, inplace=False)
    pd.testing.assert_frame_equal(again, av.get.proba(query), check_dtype=False)
    av.tl.denoise(query)
    assert "totalanvi_rna_denoised" in query.obsm


def test_a_model_that_has_never_done_without_rna_says_so(labelled):
    query = mudata.MuData({"prot": labelled["prot"][:50].copy()})
    query.obs["batch"] = "new"
    for ask in (lambda: av.tl.map_query(query, labelled), lambda: av.tl.predict(query, model=av.get.model(labelled))):
        with pytest.raises(ValueError, match="All 50 cells have proteins and no RNA, .* hide_rna=0.5"):
            ask()


def test_beside_others_they_are_outside_of_such_a_model(labelled, caplog):
    gone = labelled["prot"].obs_names[:40]
    query = without_rna(labelled, gone)
    model = av.get.model(labelled)
    assert model.setup.needs_rna
    proba = av.tl.predict(query, model=model, inplace=False)
    assert "40 cells have proteins and no RNA" in caplog.text
    np.testing.assert_array_equal(proba.isna().all(axis=1), query.obs_names.isin(gone))
    query.obs["batch"] = "new"
    av.tl.map_query(query, labelled, max_epochs=0)
    np.testing.assert_array_equal(query.obs["totalanvi_prediction"].isna(), query.obs_names.isin(gone))


def test_a_reference_can_be_prepared_for_them():
    whole = av.datasets.synthetic_cite(600, n_genes=60)
    av.tl.totalanvi(whole, "true_cell_type", batch_key="batch", max_epochs=2, hide_rna=0.3, train_size=0.7)
    model = av.get.model(whole)
    assert not model.setup.needs_rna and model.info["hide_rna"] == 0.3
    query = mudata.MuData({"prot": whole["prot"][:50].copy()})
    query.obs["batch"] = "new"
    av.tl.map_query(query, whole, max_epochs=1)
    assert query.obs["totalanvi_prediction"].notna().all()


def test_names_that_are_written_differently(fitted):
    _, whole = fitted
    mdata = mudata.MuData({"rna": whole["rna"].copy(), "prot": whole["prot"].copy()})
    mdata["prot"].obs_names = mdata["prot"].obs_names + "-1"
    with quiet_mudata():
        mdata = mudata.MuData(dict(mdata.mod))
    with pytest.raises(ValueError, match="names written differently"):
        av.tl.totalvi(mdata)


def test_one_batch_of_all_kinds_of_cells():
    mdata, _ = mosaic(300)
    av.tl.totalvi(mdata, max_epochs=2)  # no batch_key: the adversary tells kinds apart
    assert np.isfinite(mdata.obsm["X_totalvi"]).all() and mdata.n_obs == 300


def test_a_class_without_rna_is_a_class():
    mdata, whole = mosaic(900)
    truth = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    mdata.obs["known"] = truth
    gone = mdata.obs_names[(truth == "B").to_numpy()]
    mdata = without_rna(whole, mdata.obs_names[alone_in(mdata)].union(gone))
    mdata.obs["known"] = whole.obs["true_cell_type"].astype(str).reindex(mdata.obs_names)
    mdata = mdata[mdata.obs_names.isin(mdata["rna"].obs_names) | mdata.obs_names.isin(mdata["prot"].obs_names)].copy()
    av.tl.totalanvi(mdata, "known", batch_key="batch", max_epochs=2, train_size=0.7)
    assert "B" in set(av.get.model(mdata).classes)


def test_anndata_has_no_such_cells():
    whole = av.datasets.synthetic_cite(300, n_genes=60)
    x = whole["rna"].X.toarray()
    x[3] = 0
    adata = anndata.AnnData(x)
    adata.obsm["p"] = pd.DataFrame(np.ones((300, 12)), adata.obs_names, [f"p{i}" for i in range(12)])
    with pytest.raises(ValueError, match="without a single count"):
        av.tl.totalvi(adata, prot_obsm="p")


def test_a_setup_with_wrong_library_sizes_is_refused(fitted):
    model = av.get.model(fitted[0])
    for wrong in ([1.0], [1.0, 2.0, float("inf")], [1.0, 2.0, "x"], 3.0):
        facts = model.facts()
        facts["setup"] = facts["setup"] | {"log_library": wrong}
        with pytest.raises(ValueError, match="log_library|library size"):
            av.Model.from_parts(facts, model.weights(), model.history)
    assert replace(model.setup, log_library=()).checked().log_library == ()
