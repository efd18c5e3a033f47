"""Cells of new batches on a fitted model: what is read of them, what stays of the reference, what is found."""

import logging
import sys

import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from helpers import assert_same, cite, contents, mudata_of, permuted, quiet_mudata
from scipy import sparse

import anvi as av
from anvi._fit.plan import Plan

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")


def home(data, name="totalanvi"):
    return data if "total" in name or isinstance(data, AnnData) else data["rna"]


def latent(data, name="totalanvi", key=None) -> pd.DataFrame:
    part = home(data, name)
    return pd.DataFrame(part.obsm[f"X_{key or name}"], part.obs_names)


@pytest.fixture(scope="module")
def halves():
    """A reference of two batches with all four models, and a query of two others, the second of RNA alone."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        whole = cite(500, n_batches=4)
        inside = whole.obs["batch"].isin(["batch_0", "batch_1"]).to_numpy()
        reference, query = whole[inside].copy(), whole[~inside].copy()
        for name in MODELS:
            getattr(av.tl, name)(reference, batch_key="batch", max_epochs=3)
    return reference, query


@pytest.fixture(scope="module")
def reference(halves):
    """Never written to."""
    return halves[0]


@pytest.fixture
def query(halves):
    return halves[1].copy()


@pytest.fixture
def unfitted(halves):
    """Both halves, free to be changed, the reference without a model."""
    reference, query = (part.copy() for part in halves)
    for part in (reference, reference["rna"]):
        for name in MODELS:
            part.uns.pop(name, None)
    return reference, query


def mapped(query, reference, name="totalanvi", **options):
    return av.tl.map_query(query, reference, **{"model": name, "max_epochs": 2, "copy": True} | options)


def fitted_alone(data, name="totalanvi", **options):
    """A model of its own for a test."""
    getattr(av.tl, name)(data, **{"batch_key": "batch", "max_epochs": 2} | options)
    return data


# what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_slots(reference, query, name):
    before = contents(reference)
    av.tl.map_query(query, reference, model=name, max_epochs=2)
    assert_same(contents(reference), before)
    part = home(query, name)
    theirs = av.get.model(reference, name)
    assert part.obsm[f"X_{name}"].shape == (query.n_obs, theirs.config.n_latent)
    assert part.obsm[f"X_{name}"].dtype == np.float32 and np.isfinite(part.obsm[f"X_{name}"]).all()
    assert set(part.obs[f"{name}_split"]) == {"train", "validation"}
    entries = part.uns[name]
    assert list(entries["batches"]) == ["batch_0", "batch_1", "batch_2", "batch_3"]
    assert len(entries["history"]) == entries["params"]["epochs"] == 2
    facts = entries["reference"]
    assert facts["name"] == facts["key"] == name and facts["n_cells"] == reference.n_obs
    assert facts["new_batches"] == ["batch_2", "batch_3"] and facts["genes_matched"] == 100
    assert facts["sha256"] == theirs.fingerprint() != av.get.model(query, name).fingerprint()
    if name.endswith("anvi"):
        assert list(part.obs[f"{name}_prediction"].cat.categories) == list(theirs.classes)
        assert part.obs[f"{name}_confidence"].dtype == np.float32
        np.testing.assert_allclose(av.get.proba(query, model=name).sum(axis=1), 1, rtol=1e-5)
    assert "cell_type" in query.obs and f"{name}_batch" not in part.obs  # the query has a column of its own


@pytest.mark.parametrize(("name", "suffix"), [("totalanvi", "h5mu"), ("scanvi", "h5mu"), ("totalvi", "zarr")])
def test_a_mapping_survives_a_file(reference, query, tmp_path, name, suffix):
    mods = {mod: AnnData(query[mod].X, obs=query[mod].obs[[]], var=query[mod].var[[]]) for mod in query.mod}
    query = mapped(mudata_of(mods, query), reference, name)
    file = tmp_path / f"query.{suffix}"
    with quiet_mudata():
        (query.write_h5mu if suffix == "h5mu" else query.write_zarr)(file)
        again = (mudata.read_h5mu if suffix == "h5mu" else mudata.read_zarr)(file)
    av.tl.latent(again, model=name, key_added="again")
    np.testing.assert_array_equal(home(again, name).obsm["X_again"], home(query, name).obsm[f"X_{name}"])
    facts = home(again, name).uns[name]["reference"]
    assert float(facts["genes_matched"]) == 100 and list(facts["new_batches"]) == ["batch_2", "batch_3"]
    onto = mapped(again, file, name, key_added="onto")  # and the file is a reference
    assert home(onto, name).uns["onto"]["reference"]["sha256"] == av.get.model(query, name).fingerprint()


def test_a_copy_leaves_the_query_alone(reference, query):
    before = contents(query)
    result = mapped(query, reference)
    assert_same(contents(query), before)
    assert av.tl.map_query(query, reference, model="totalanvi", max_epochs=2) is None
    pd.testing.assert_frame_equal(latent(query), latent(result))


def test_the_other_verbs_work_on_a_mapped_query(reference, query):
    query = mapped(query, reference)
    before = latent(query)
    av.tl.latent(query)
    av.tl.predict(query)
    av.tl.denoise(query)
    av.tl.foreground(query)
    pd.testing.assert_frame_equal(latent(query), before)
    assert np.isfinite(av.get.table(query, "totalanvi_prot_denoised").to_numpy()).all()
    assert len(av.get.history(query)) == 2


def test_colours_are_those_of_the_reference(reference, query):
    reference = reference.copy()
    reference.uns["totalanvi_prediction_colors"] = colors = [f"#00000{i}" for i in range(6)]
    assert mapped(query, reference).uns["totalanvi_prediction_colors"] == colors


def test_a_model_a_folder_and_a_file_are_references_too(reference, query, tmp_path):
    model = av.get.model(reference, "totalanvi")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    expected = latent(mapped(query, reference))
    av.write_model(reference, tmp_path / "folder", model="totalanvi")
    with quiet_mudata():
        reference.write_h5mu(tmp_path / "reference.h5mu")
    options = {"max_epochs": 2, "copy": True}
    for one, key in ((model, None), (tmp_path / "folder", None), (str(tmp_path / "reference.h5mu"), "totalanvi")):
        pd.testing.assert_frame_equal(latent(av.tl.map_query(query, one, model=key, **options)), expected)
    for name, value in model.network.state_dict().items():
        assert bool((value == before[name]).all()), name
    with pytest.raises(
        FileNotFoundError, match="is neither a folder that av.write_model made nor a .h5mu, .h5ad or .zarr"
    ):
        mapped(query, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="several fitted models: .* Name one: model="):
        mapped(query, reference, None)


def test_a_mapped_query_is_a_reference_again_and_keeps_its_provenance(reference, query, tmp_path):
    first, second = (query[query.obs["batch"] == f"batch_{i}"].copy() for i in (2, 3))
    first = mapped(first, reference)
    second = mapped(second, first)
    assert list(second.uns["totalanvi"]["batches"]) == ["batch_0", "batch_1", "batch_2", "batch_3"]
    assert second.uns["totalanvi"]["reference"]["sha256"] == av.get.model(first).fingerprint()
    av.write_model(first, tmp_path / "folder")
    assert (
        av.read_model(tmp_path / "folder").info["reference"]["sha256"] == first.uns["totalanvi"]["reference"]["sha256"]
    )


# the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch_key", "covariates"), [("batch", True), (None, False)])
def test_the_outputs_of_the_reference_are_the_same_bit_for_bit(halves, name, covariates, batch_key):
    """Under the widened model, its own cells lie where they lay; also with one batch, and with covariates behind it."""
    reference, query = (part.copy() for part in halves)
    options = {}
    for i, part in enumerate((reference, query)):
        part.obs["donor"] = [f"{'rq'[i]}{k % 3}" for k in range(part.n_obs)]
        part.obs["age"] = np.linspace(0, 1, part.n_obs)
    if covariates:
        options = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    fitted_alone(reference, name, batch_key=batch_key, key_added="mine", max_epochs=1, **options)
    mapped_query = mapped(query, reference, "mine", batch_key="batch")
    wide = av.get.model(mapped_query, "mine")
    reference.obs["batch"] = "all" if batch_key is None else reference.obs["batch"]
    expected = latent(reference, name, "mine")
    assert (av.get.model(reference, "mine").config.n_batches == 1) == (batch_key is None)
    np.testing.assert_array_equal(av.tl.latent(reference, model=wide, inplace=False), expected)
    if name.endswith("anvi"):
        found = av.tl.predict(reference, model=wide, inplace=False)
        np.testing.assert_array_equal(found, av.get.proba(reference, model="mine"))


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_the_reference_are_in_the_mapped_model_bit_for_bit(reference, query, name):
    theirs = av.get.model(reference, name).network.state_dict()
    ours = av.get.model(mapped(query, reference, name), name).network.state_dict()
    assert theirs.keys() == ours.keys()
    grown = 0
    for part, value in theirs.items():
        np.testing.assert_array_equal(ours[part][: len(value)] if value.dim() else ours[part], value, err_msg=part)
        grown += value.shape != ours[part].shape
    assert grown == (2 if "total" not in name else 14 - 1)  # two layers of the encoder, trunks, heads, prior


def test_freeze_none_moves_the_reference_and_no_epoch_moves_nothing(reference, query):
    theirs = av.get.model(reference, "totalanvi").network.state_dict()
    free = av.get.model(mapped(query, reference, freeze="none")).network.state_dict()
    assert not (free["encoder.mean.weight"] == theirs["encoder.mean.weight"]).all()
    assert not (free["encoder.stack.norm.0.running_mean"] == theirs["encoder.stack.norm.0.running_mean"]).all()
    still = mapped(query, reference, max_epochs=0)
    rows = av.get.model(still).network.encoder.stack.linear[0].covariates.detach().numpy()
    for row in rows[2:]:
        np.testing.assert_allclose(row, rows[:2].mean(0), rtol=1e-5, atol=1e-7)
    assert "totalanvi_split" not in still.obs and len(av.get.history(still)) == 0
    assert still.uns["totalanvi"]["params"]["epochs"] == 0
    with pytest.raises(ValueError, match="freeze='all' is not one of 'reference', 'none'"):
        mapped(query, reference, freeze="all")


def test_the_terms_weigh_what_they_did_in_the_references_fit(unfitted):
    reference, query = unfitted
    chosen = {"max_kl_weight": 0.3, "protein_weight": 2.0, "classification_ratio": 7.0, "label_smoothing": 0.05}
    fitted_alone(reference, **chosen)
    av.tl.map_query(query, reference, max_epochs=1)
    info = av.get.model(query).info
    assert {name: info[name] for name in chosen} == chosen
    assert av.get.history(query)["kl_weight"].iloc[-1] == pytest.approx(0.3)


@pytest.mark.parametrize(("freeze", "steps", "lr"), [("reference", 1000, 1e-2), ("none", 2000, 4e-3)])
def test_length_and_rate_follow_from_the_query_and_from_what_is_frozen(
    reference, query, monkeypatch, freeze, steps, lr
):
    plans = []

    def stop(network, *args):
        plans.extend(arg for arg in args if isinstance(arg, Plan))
        raise KeyboardInterrupt

    monkeypatch.setattr("anvi._fit.surgery.train_new_rows", stop)
    monkeypatch.setattr(sys.modules["anvi.tl.map_query"], "fit", lambda *args, **options: stop(*args))
    for batch_size in (2, 16, 128):
        with pytest.raises(KeyboardInterrupt):
            mapped(query, reference, freeze=freeze, max_epochs=None, batch_size=batch_size)
    n_train = query.n_obs - round(0.1 * query.n_obs)
    expected = [min(100, np.ceil(steps / np.ceil(n_train / size))) for size in (2, 16, 128)]
    assert [plan.max_epochs for plan in plans] == expected and {plan.lr for plan in plans} == {lr}


def test_known_batches_need_no_training(reference, caplog):
    again = reference.copy()
    with caplog.at_level(logging.INFO, "anvi"):
        mapped(again, reference, key_added="again")
    assert "knows all batches and categories: nothing to train" in caplog.text
    result = mapped(again, reference, key_added="again")
    pd.testing.assert_frame_equal(latent(result, key="again"), latent(reference))
    assert "again_split" not in result.obs


# features ---------------------------------------------------------------------------------------------------------


def with_rna(query, rna):
    return mudata_of({"rna": rna, "prot": query["prot"]}, query)


def test_the_order_of_genes_and_cells_changes_nothing(reference, query):
    expected = latent(mapped(query, reference))
    shuffled = query["rna"][:, np.random.default_rng(0).permutation(60)].copy()
    other = mudata_of({"rna": permuted(shuffled, 1), "prot": permuted(query["prot"], 2)}, query)
    pd.testing.assert_frame_equal(latent(mapped(other, reference)).loc[expected.index], expected)


def test_further_genes_are_left_out(reference, query):
    expected = latent(mapped(query, reference))
    rna = query["rna"]
    more = AnnData(sparse.hstack([rna.X[:, :30], 9 * rna.X[:, :5], rna.X[:, 30:]]).tocsr(), obs=rna.obs)
    more.var_names = [*rna.var_names[:30], *(f"other {i}" for i in range(5)), *rna.var_names[30:]]
    pd.testing.assert_frame_equal(latent(mapped(with_rna(query, more), reference)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_missing_genes_are_masked(reference, query, name):
    """With nothing to train, the latent space is that of a reference that has never heard of the missing genes."""
    kept = np.setdiff1d(np.arange(60), np.arange(3, 60, 5))
    few = with_rna(query, query["rna"][:, kept].copy())
    result = mapped(few, reference, name, max_epochs=0)
    facts = home(result, name).uns[name]["reference"]
    assert facts["genes_matched"] == 80 and facts["missing_genes"] == [f"G{i + 1:03d}" for i in range(3, 60, 5)]
    assert facts["genes"] == list(query["rna"].var_names[kept]) == list(av.get.model(result, name).setup.genes)
    rna_only = av.get.model(reference, name).network
    x = few["rna"].X.toarray()
    x = np.log1p(x / (1 + x.mean(1, keepdims=True))) if "total" in name else np.log1p(x)
    state = {part: value.double().numpy() for part, value in rna_only.state_dict().items()}
    first, rows = state["encoder.stack.linear.0.weight"], state["encoder.stack.linear.0.covariates"]
    hidden = x @ first[:, kept].T + state["encoder.stack.linear.0.bias"] + rows.mean(0)
    if "total" in name:
        y = pd.DataFrame(query["prot"].X, query["prot"].obs_names).reindex(query.obs_names).to_numpy()
        scale = 1 + np.nan_to_num(np.nansum(y, 1) / (~np.isnan(y)).sum(1).clip(1))
        hidden += np.nan_to_num(np.log1p(y / scale[:, None])) @ first[:, 60:].T
    for i in range(rna_only.config.n_layers_encoder):
        if i:
            hidden = hidden @ state[f"encoder.stack.linear.{i}.weight"].T + state[f"encoder.stack.linear.{i}.bias"]
            hidden += state[f"encoder.stack.linear.{i}.covariates"].mean(0)
        norm = {
            part: state[f"encoder.stack.norm.{i}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        }
        hidden = (hidden - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm["bias"]
        hidden = hidden.clip(0)
    expected = hidden @ state["encoder.mean.weight"].T + state["encoder.mean.bias"]
    np.testing.assert_allclose(latent(result, name), expected, rtol=1e-4, atol=1e-4)


def test_what_stands_in_a_padded_gene_does_not_matter(reference, query):
    few = with_rna(query, query["rna"][:, 12:].copy())
    expected = latent(mapped(few, reference))
    aligned = av.pp.align_query(few, reference, model="totalanvi")
    pd.testing.assert_frame_equal(latent(mapped(aligned, reference)), expected)
    padded = aligned["rna"].var["anvi_padded"].to_numpy()
    assert padded.sum() == 12
    aligned["rna"].X = np.where(padded, 77.0, aligned["rna"].X.toarray()).astype(np.float32)
    pd.testing.assert_frame_equal(latent(mapped(aligned, reference)), expected)


def ensembl(query, version):
    rna = query["rna"].copy()
    rna.var["gene_ids"] = [f"ENSG{i:011d}.{version}" for i in range(1, 61)]
    return with_rna(query, rna)


def test_genes_by_a_column_of_var(reference, query):
    expected = latent(mapped(query, reference))
    rna = query["rna"].copy()
    rna.var["symbol"] = rna.var_names
    rna.var_names = [f"ENSG{i:011d}" for i in range(60)]
    renamed = with_rna(query, rna)
    result = mapped(renamed, reference, gene_key="symbol")
    pd.testing.assert_frame_equal(latent(result), expected)
    assert list(av.get.model(result).setup.genes) == list(rna.var_names)  # every other verb finds them
    av.tl.latent(result, key_added="again")
    np.testing.assert_array_equal(result.obsm["X_again"], expected)
    with pytest.raises(
        ValueError, match=r"0 of the reference's 60 genes.*var\['symbol'\] matches 100%: pass gene_key='s"
    ):
        mapped(renamed, reference)
    with pytest.raises(KeyError, match=r"gene_key='symbols' is not in mdata\['rna'\].var; there are: .*'symbol'"):
        mapped(renamed, reference, gene_key="symbols")


def test_versions_of_ensembl_ids_do_not_matter(unfitted):
    reference, later = (ensembl(part, version) for part, version in zip(unfitted, (3, 11), strict=True))
    for part in (reference, later):
        part["rna"].var_names = part["rna"].var["gene_ids"].astype(str)
    fitted_alone(reference)
    result = av.tl.map_query(later, reference, max_epochs=1, copy=True)
    assert result.uns["totalanvi"]["reference"]["genes_matched"] == 100
    assert result.uns["totalanvi"]["reference"]["matched_by"] == "var_names without versions"


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda names: [f"ENSG{i:011d}" for i in range(60)],
            "Are these Ensembl ids.* Only the query seems to have",
        ),
        (lambda names: [f"x{i}" for i in range(60)], "Are these Ensembl ids, or genes of another species"),
        (lambda names: [name.lower() for name in names], "agree but for upper and lower case"),
        (
            lambda names: [*names[:20], *(f"x{i}" for i in range(40))],
            r"33%.*at least 50% are needed.*lower min_genes=",
        ),
    ],
)
def test_too_few_genes(reference, query, rename, message):
    rna = query["rna"].copy()
    rna.var_names = rename(rna.var_names)
    with pytest.raises(ValueError, match=message) as raised:
        mapped(with_rna(query, rna), reference)
    assert "G0" in str(raised.value) and str(rna.var_names[0]) in str(raised.value)


def test_the_floor_can_be_moved(reference, query, caplog):
    few = with_rna(query, query["rna"][:, :20].copy())
    assert mapped(few, reference, min_genes=0.3).uns["totalanvi"]["reference"]["genes_matched"] == 33.33
    with pytest.raises(ValueError, match="at least 40% are needed"):
        mapped(few, reference, min_genes=0.4)
    said = [record.levelname for record in caplog.records if "20 of the reference's 60 (33.3%)" in record.message]
    assert said == ["WARNING"]


def test_ambiguous_names_count_as_missing(reference, query, caplog):
    rna = query["rna"].copy()
    rna.var["symbol"] = [*rna.var_names[:58], "G001", None]
    result = mapped(with_rna(query, rna), reference, gene_key="symbol")
    assert result.uns["totalanvi"]["reference"]["missing_genes"] == ["G001", "G059", "G060"]
    assert "1 genes are ambiguous in mdata['rna'] by var['symbol'] and count as missing: G001" in caplog.text


def test_other_proteins(reference, query, caplog):
    """Those of the query alone are ignored by name, those of the reference alone are not measured."""
    prot = query["prot"]
    few = mudata_of({"rna": query["rna"], "prot": prot[:, 5:].copy()}, query)
    expected = mapped(few, reference)
    facts = expected.uns["totalanvi"]["reference"]
    assert facts["missing_proteins"] == [f"P{i:02d}" for i in range(1, 6)] and facts["proteins_matched"] == 75
    more = AnnData(np.hstack([prot.X[:, ::-1][:, :15], 99 * np.ones((prot.n_obs, 2))]).astype(np.float32), obs=prot.obs)
    more.var_names = [*prot.var_names[::-1][:15], "isotype", "P01 bis"]
    with caplog.at_level(logging.INFO, "anvi"):
        found = mapped(mudata_of({"rna": query["rna"], "prot": more}, query), reference)
    pd.testing.assert_frame_equal(latent(found), latent(expected))
    assert found.uns["totalanvi"]["reference"]["ignored_proteins"] == ["isotype", "P01 bis"]
    assert "that the reference does not know are ignored: isotype, P01 bis" in caplog.text
    assert "proteins: 15 of the reference's 20 (75.0%)" in caplog.text
    more.var_names = [f"antibody {i}" for i in range(17)]
    with pytest.raises(ValueError, match="None of the model's 20 proteins"):
        mapped(mudata_of({"rna": query["rna"], "prot": more}, query), reference)


@pytest.mark.parametrize("form", ["csr", "csr with zeros for what is missing"])
def test_sparse_proteins(reference, query, form):
    query = query[query.obs["batch"] == "batch_2"].copy()
    zeros = np.nan_to_num(query["prot"].X)
    if form == "csr":
        zeros = query["prot"].X
        zeros[np.isnan(zeros)] = 0
    expected = latent(mapped(query, reference))
    other = query.copy()
    other["prot"].X = sparse.csr_matrix(zeros)
    pd.testing.assert_frame_equal(latent(mapped(other, reference)), expected)


def test_a_query_of_rna_alone(reference, query):
    alone = mudata_of({"rna": query["rna"]}, query)
    result = mapped(alone, reference)
    assert result.uns["totalanvi"]["reference"]["proteins_matched"] == 0
    assert np.isfinite(latent(result)).all(axis=None)
    adata = query["rna"].copy()
    adata.obs["batch"] = query.obs["batch"]
    other = mapped(adata, reference)
    pd.testing.assert_frame_equal(latent(other), latent(result).loc[adata.obs_names])


# categories -------------------------------------------------------------------------------------------------------


def test_a_query_without_a_batch_column_is_one_batch(reference, query, caplog):
    bare = query.copy()
    del bare.obs["batch"]
    result = mapped(bare, reference)
    assert "the query has no column 'batch': all its cells are taken as 'query'" in caplog.text
    assert result.uns["totalanvi"]["reference"]["new_batches"] == ["query"]
    assert (result.obs["totalanvi_batch"] == "query").all()
    named = query.copy()
    named.obs["batch"] = "query"
    pd.testing.assert_frame_equal(latent(mapped(named, reference)), latent(result))
    av.tl.latent(result, key_added="again")
    np.testing.assert_array_equal(result.obsm["X_again"], latent(result))
    with pytest.raises(KeyError, match="batch_key='lane' was found in none of"):
        mapped(bare, reference, batch_key="lane")
    # a second such query onto the mapped one is another batch
    assert mapped(bare, result).uns["totalanvi"]["reference"]["new_batches"] == ["query_2"]


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_missing_batches_are_a_batch(reference, query, caplog, name):
    query.obs["batch"] = query.obs["batch"].astype(object)
    query.obs.loc[query.obs_names[:40], "batch"] = np.nan
    result = mapped(query, reference, name)
    assert "'batch' has no value for 40 cells of the query: taken as 'query'" in caplog.text
    assert list(home(result, name).uns[name]["batches"]) == ["batch_0", "batch_1", "batch_2", "batch_3", "query"]
    column = home(result, name).obs[f"{name}_batch"]
    assert (column[query.obs_names[:40]] == "query").all() and (column[40:] == query.obs["batch"][40:]).all()
    assert query.obs["batch"].isna().sum() == 40
    if name == "scanvi":
        assert result.obs["rna:scanvi_batch"].notna().all()


def test_a_failed_mapping_leaves_no_column(reference, query):
    del query.obs["batch"]
    query["rna"].X = sparse.csr_matrix(np.where(np.arange(query.n_obs)[:, None] == 7, 0, query["rna"].X.toarray()))
    before = contents(query)
    with pytest.raises(ValueError, match="without a single count"):
        av.tl.map_query(query, reference, model="totalanvi")
    with pytest.raises(ValueError, match="without a single count"):
        av.tl.map_query(query, reference, model="scanvi")
    assert_same(contents(query), before)


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_a_failed_mapping_leaves_the_one_before(reference, query, name):
    del query.obs["batch"]
    query = mapped(query, reference, name)
    counts = query["rna"].X.copy()
    query["rna"].X = sparse.csr_matrix(np.where(np.arange(query.n_obs)[:, None] == 7, 0, counts.toarray()))
    before = contents(query)
    with pytest.raises(ValueError, match="without a single count"):
        av.tl.map_query(query, reference, model=name)
    assert_same(contents(query), before)


def test_a_batch_column_of_the_users_own_is_not_overwritten(reference, query):
    query.obs["totalanvi_batch"] = query.obs.pop("batch")
    with pytest.raises(ValueError, match=r"obs\['totalanvi_batch'\] would be overwritten.*pass key_added="):
        mapped(query, reference)
    assert mapped(query, reference, key_added="onto").obs["totalanvi_batch"].equals(query.obs["totalanvi_batch"])


def test_other_covariates(unfitted, caplog):
    """Unseen categories, missing values and a missing column: each is a category, in rows of its own."""
    reference, query = unfitted
    reference.obs["donor"] = np.where(np.arange(reference.n_obs) % 2, "a", "b")
    reference.obs["kit"] = "v2"
    reference.obs["sex"] = np.where(np.arange(reference.n_obs) % 3, "m", "f")
    query.obs["donor"] = np.where(np.arange(query.n_obs) % 2, "a", "c")
    query.obs["kit"] = np.where(np.arange(query.n_obs) % 5, "v3", None)
    fitted_alone(reference, categorical_covariate_keys=["donor", "kit", "sex"])
    result = av.tl.map_query(query, reference, max_epochs=2, copy=True)
    setup = av.get.model(result).setup
    assert setup.categorical == (
        ("donor", ("a", "b", "c")),
        ("totalanvi_covariate_kit", ("v2", "query", "v3")),
        ("totalanvi_covariate_sex", ("f", "m", "query")),
    )
    assert av.get.model(result).config.covariate_sizes == (4, 3, 3, 3)
    assert "the query has no column 'sex': all its cells are taken as 'query'" in caplog.text
    av.tl.predict(result, key_added="again")
    np.testing.assert_array_equal(result.obsm["again_proba"], result.obsm["totalanvi_proba"])


@pytest.mark.parametrize("name", MODELS)
def test_per_batch_parameters(halves, name):
    """Dispersions, library priors and efficiencies get rows too; all of them finite and trained."""
    reference, query = (part.copy() for part in halves)
    options = {"dispersion": "gene-batch", "library": "latent", "n_hidden": 16}
    if "total" in name:
        options |= {"protein_dispersion": "protein-batch", "objective": "scvi-tools"}
    fitted_alone(reference, name, key_added="mine", **options)
    batch = query.obs["batch"].astype(str)
    batch.iloc[np.flatnonzero(batch == "batch_2")[:20]] = "batch_0"  # a known one: what the reference says of it stays
    query.obs["batch"] = batch
    theirs = av.get.model(reference, "mine").network
    network = av.get.model(mapped(query, reference, "mine"), "mine").network
    assert (network.library_mean[:2] == theirs.library_mean).all()
    assert (network.library_var[:2] == theirs.library_var).all() and (
        network.rna.log_theta[:2] == theirs.rna.log_theta
    ).all()
    assert network.rna.log_theta.shape == (4, 60) and network.library_mean.shape == (4,)
    if "total" in name:
        assert network.protein.log_phi.shape == network.protein.log_efficiency.shape == (4, 20)
        # batch_3 has no protein: its rows stay where they started
        assert not (network.protein.log_phi[2] == network.protein.log_phi[3]).any()
    assert all(value.isfinite().all() for value in network.state_dict().values())


def test_panels_of_the_query(unfitted):
    reference, query = unfitted
    fitted_alone(reference, panel_key="panel")
    result = av.tl.map_query(query, reference, max_epochs=1, copy=True)
    setup = av.get.model(result).setup
    assert setup.panels == ("panel_0", "panel_1", "none") and not any(setup.measured[2])
    query.obs["kit"] = np.where(np.arange(query.n_obs) % 2, "x", "y")
    other = av.tl.map_query(query, reference, max_epochs=1, copy=True, panel_key="kit")
    setup = av.get.model(other).setup
    assert setup.panels == ("panel_0", "panel_1", "x", "y") and setup.panel_key == "kit"
    assert all(setup.measured[2]) and av.get.model(other).config.n_panels == 4
    del query.obs["panel"]
    third = av.tl.map_query(query, reference, max_epochs=1, copy=True)
    assert (third.obs["totalanvi_panel"].dropna() == "query").all()


# labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_not_looked_at_unless_named(reference, query):
    expected = latent(mapped(query, reference))
    query.obs["cell_type"] = "nonsense"
    pd.testing.assert_frame_equal(latent(mapped(query, reference)), expected)
    del query.obs["cell_type"]
    result = mapped(query, reference)
    pd.testing.assert_frame_equal(latent(result), expected)
    assert av.get.model(result).classes == av.get.model(reference, "totalanvi").classes
    assert (result.obs["totalanvi_label"] == result.obs["totalanvi_prediction"]).all()


def test_unseen_labels_are_kept_apart(reference, query, caplog):
    labels = query.obs["true_cell_type"].astype(str)
    labels[:30], labels[30:35], labels[35:50] = "NK/T", "odd", None
    query.obs["author"] = labels
    result = mapped(query, reference, labels_key="author")
    said = [record for record in caplog.records if "the reference has no class" in record.message]
    assert len(said) == 1 and "'NK/T' (30 cells), 'odd' (5 cells)" in said[0].message
    assert result.uns["totalanvi"]["params"]["n_labelled"] == query.n_obs - 50
    given = query.obs["author"]
    assert (result.obs["author"].isna() == given.isna()).all() and (result.obs["author"] == given)[given.notna()].all()
    assert set(result.obs["totalanvi_prediction"]) <= set(av.get.model(reference, "totalanvi").classes)
    label, prediction = result.obs["totalanvi_label"], result.obs["totalanvi_prediction"]
    assert list(label.cat.categories) == [*prediction.cat.categories, "NK/T", "odd"]
    for cell, said in labels.items():
        assert label[cell] == (prediction[cell] if pd.isna(said) else said)
    assert "train_accuracy" in av.get.history(result)
    with pytest.raises(ValueError, match=r"labels_key='author' is of no use: the reference \(totalvi\) has no labels"):
        mapped(query, reference, "totalvi", labels_key="author")


def test_a_class_with_a_slash(unfitted):
    reference, query = unfitted
    reference.obs["cell_type"] = reference.obs["cell_type"].cat.rename_categories({"NK": "NK/T"})
    with quiet_mudata():
        fitted_alone(reference)
        result = av.tl.map_query(query, reference, max_epochs=1, copy=True)
    assert "NK/T" in av.get.proba(result).columns and "NK/T" in av.get.table(result, "totalanvi_proba")


# small and odd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_cells(reference, query, n):
    result = mapped(query[:n].copy(), reference)
    assert np.isfinite(latent(result)).all(axis=None)
    assert ("totalanvi_split" in result.obs) == (n > 1)


def test_the_same_seed_gives_the_same_numbers(reference, query):
    one, other, third = (mapped(query, reference, random_state=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(latent(one), latent(other))
    assert not np.array_equal(latent(one), latent(third))


def test_a_fit_of_the_querys_own_is_not_buried(reference, query):
    fitted_alone(query, max_epochs=1)
    with pytest.raises(ValueError, match="fit of its own under 'totalanvi'; pass key_added="):
        mapped(query, reference)
    result = mapped(query, reference, key_added="onto")
    assert {"totalanvi", "onto"} <= set(result.uns)
    mapped(result, reference, key_added="onto")  # a mapping may be repeated


def test_a_view_becomes_an_object_of_its_own(reference, query):
    view = query[query.obs["batch"] == "batch_2"]
    with quiet_mudata(), pytest.warns(UserWarning, match="The object is a view"):
        av.tl.map_query(view, reference, model="totalanvi", max_epochs=1)
    assert "X_totalanvi" in view.obsm and "X_totalanvi" not in query.obsm


def test_counts_in_a_layer(reference, query):
    expected = latent(mapped(query, reference))
    for mod in ("rna", "prot"):
        query[mod].layers["raw"] = query[mod].X.copy()
        query[mod].X = np.log1p(query[mod].X)
    pd.testing.assert_frame_equal(latent(mapped(query, reference, layer="raw")), expected)
    with pytest.raises(ValueError, match="Counts seem to be in layer 'raw'"):
        mapped(query, reference)


def test_a_reference_of_a_layer_and_a_query_without_it(halves):
    reference, query = (part.copy() for part in halves)
    expected = mapped(query, fitted_alone(reference, key_added="mine"), "mine")
    for mod in ("rna", "prot"):
        reference[mod].layers["raw"] = reference[mod].X.copy()
    fitted_alone(reference, key_added="layered", layer="raw")
    result = mapped(query, reference, "layered", key_added="mine")
    pd.testing.assert_frame_equal(latent(result, key="mine"), latent(expected, key="mine"))


def test_an_anndata_with_proteins_in_obsm(reference, query):
    expected = latent(mapped(query, reference))
    adata = query["rna"].copy()
    adata.obs["batch"] = query.obs["batch"]
    prot = query["prot"]
    adata.obsm["protein"] = pd.DataFrame(prot.X, prot.obs_names, prot.var_names).reindex(adata.obs_names)
    found = latent(mapped(adata, reference, prot_obsm="protein"))
    np.testing.assert_allclose(found.loc[expected.index], expected, rtol=1e-5, atol=1e-6)


def test_a_blind_encoder_says_so(unfitted, caplog):
    reference, query = unfitted
    fitted_alone(reference, encode_covariates=False)
    with caplog.at_level(logging.INFO, "anvi"):
        one, other = (av.tl.map_query(query, reference, max_epochs=n, copy=True) for n in (0, 2))
    assert "its encoder does not see batches" in caplog.text
    np.testing.assert_array_equal(latent(one), latent(other))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_epochs": -1}, ValueError, "max_epochs=-1 must be at least"),
        ({"max_epochs": 1.5}, TypeError, "max_epochs=1.5 must be a whole number"),
        ({"batch_size": 1}, ValueError, "batch_size=1 leaves batch norm nothing"),
        ({"key_added": "a/b"}, ValueError, "key_added='a/b' must be a plain name"),
        ({"model": "scvy"}, KeyError, "model='scvy' is no fitted model"),
        ({"rna_mod": "gex"}, KeyError, "no modality 'gex'"),
        ({"min_genes": 2}, ValueError, "min_genes=2 is a share"),
    ],
)
def test_errors_come_first(reference, query, options, error, message):
    before = contents(query)
    with pytest.raises(error, match=message):
        av.tl.map_query(query, reference, **{"model": "totalanvi"} | options)
    assert_same(contents(query), before)
    with pytest.raises(TypeError, match="Expected a MuData or an AnnData, got ndarray"):
        av.tl.map_query(np.zeros(3), reference, model="totalanvi")


def test_predict_names_the_next_command(reference, query):
    model = av.get.model(reference, "totalanvi")
    with pytest.raises(ValueError, match=r"which the model has not seen.*av\.tl\.map_query\(query, reference\)"):
        av.tl.predict(query, model=model)
    with pytest.raises(ValueError, match=r"lacks 10 of the model's 60 genes.*av\.tl\.map_query\(query, reference\)"):
        av.tl.predict(with_rna(query, query["rna"][:, 10:].copy()), model=model)


# recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_one_half_onto_the_other_gives_nearly_the_labels_of_a_fit_to_both(name):
    """And with the names of the genes shuffled, which is the control, next to nothing."""
    whole = cite(2000, n_genes=400, n_batches=4, labeled_fraction=0.8)
    inside = whole.obs["batch"].isin(["batch_0", "batch_1"]).to_numpy()
    truth = whole.obs["true_cell_type"].astype(str)[~inside]
    labels = whole.obs["cell_type"].astype(str)
    whole.obs["cell_type"] = labels.where(inside, "Unknown").astype("category")
    reference, query = whole[inside].copy(), whole[~inside].copy()

    def accuracy(data):
        return float((home(data, name).obs[f"{name}_prediction"].astype(str).reindex(truth.index) == truth).mean())

    for data in (whole, reference):
        getattr(av.tl, name)(data, batch_key="batch", max_epochs=30)
    together = accuracy(whole)
    shuffled = query["rna"].copy()
    shuffled.var_names = np.random.default_rng(0).permutation(shuffled.var_names)
    control = mudata_of({"rna": shuffled}, query)
    rna_only = mudata_of({"rna": query["rna"]}, query)
    few = mudata_of(
        {"rna": query["rna"][:, np.random.default_rng(1).permutation(400)[:320]].copy(), "prot": query["prot"]}, query
    )
    for data in (query, rna_only, few, control):
        av.tl.map_query(data, reference, max_epochs=20)
    assert together > 0.9
    assert accuracy(query) > together - 0.03
    assert accuracy(rna_only) > together - 0.05 and accuracy(few) > together - 0.05
    assert accuracy(control) < 0.5


@pytest.mark.slow
def test_panels_that_overlap_in_part_fill_each_others_gaps():
    """Three panels in one reference, then a query with a fourth one: hidden counts against the truth.

    The measure is a forecaster who knows the true type of every cell and says the mean of that type where the protein
    was seen: what no imputation by type can pass but by the little that the cell's own genes add.
    """
    whole = cite(1600, n_genes=400, n_batches=4, n_panels=3, rna_only_batch=False)
    truth, types = av.get.table(whole, "true_protein_counts"), whole.obs["true_cell_type"].astype(str)
    whole.obs["panel"] = panel = whole.obs["batch"].astype(str).str.replace("batch", "kit")
    hidden = {"kit_0": range(6), "kit_1": range(6, 12), "kit_2": range(12, 18), "kit_3": [0, 3, 6, 9, *range(12, 20)]}
    seen = truth.copy()
    for name, places in hidden.items():
        seen.loc[panel == name, truth.columns[list(places)]] = np.nan
    whole["prot"].X = seen.loc[whole["prot"].obs_names].to_numpy(dtype=np.float32)
    inside = (panel != "kit_3").to_numpy()
    reference, query = whole[inside].copy(), whole[~inside].copy()
    fitted_alone(reference, panel_key="panel", max_epochs=30)
    av.tl.map_query(query, reference, max_epochs=20)
    setup = av.get.model(query).setup
    assert setup.panels == tuple(hidden)
    for name, row in zip(setup.panels, setup.measured, strict=True):
        assert np.flatnonzero(~np.array(row)).tolist() == list(hidden[name])

    def correlation(one, other):
        return np.corrcoef(np.log1p(one), np.log1p(other))[0, 1]

    for data, panels in ((reference, ("kit_0", "kit_1", "kit_2")), (query, ("kit_3",))):
        found = av.tl.denoise(data, features=[f"prot:{name}" for name in truth], include_background=True)
        scores = []
        for name in panels:
            cells = data.obs_names[data.obs["panel"] == name]
            for place in hidden[name]:
                protein = truth.columns[place]
                if not whole["prot"].varm["true_markers"].loc[protein].any():
                    continue  # nothing but background: only its mean could be known
                known = np.log1p(seen.loc[reference.obs_names, protein]).groupby(types).mean()
                forecast = np.expm1(types[cells].map(known))
                counts = truth.loc[cells, protein]
                imputed = found.loc[cells].iloc[:, place]
                scores.append((correlation(imputed, counts), correlation(forecast, counts)))
        ours, theirs = np.array(scores).T
        assert len(ours) >= 5 and theirs.mean() > 0.6
        assert ours.mean() > theirs.mean() - 0.05 and (ours > theirs - 0.2).all(), (ours, theirs)
