"""Parameters of all likelihoods of all models against the network written as loops."""

import numpy as np
import pytest
import torch
from helpers import cite
from queries import by_hand

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells

SOME = [0, 123, 299]


def hands(mdata, key):
    model = av.get.model(mdata, key)
    cells = read_cells(mdata, model.setup, labels=True)
    batch = take(cells, torch.tensor(SOME))
    return {cells.names[n]: by_hand(model, batch, i) for i, n in enumerate(SOME)}


@pytest.mark.parametrize("key", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_the_four_models(fitted, key):
    found = av.get.likelihood_parameters(fitted, model=key)
    joint = "total" in key
    assert ("rna_zero_probability" in found) == (not joint) and ("prot_phi" in found) == joint
    assert found["obs"].values.tolist() == fitted.obs_names.tolist()
    for name, hand in hands(fitted, key).items():
        cell = found.sel(obs=name)
        np.testing.assert_allclose(cell["rna_mean"], hand.library * hand.share, rtol=1e-4)
        np.testing.assert_allclose(cell["rna_theta"], hand.theta, rtol=1e-5)
        if not joint:
            np.testing.assert_allclose(cell["rna_zero_probability"], hand.zero, rtol=1e-4)
            continue
        np.testing.assert_allclose(cell["prot_background_log_mean"], hand.back_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cell["prot_background_log_scale"], hand.back_sd, rtol=1e-4)
        np.testing.assert_allclose(cell["prot_foreground_factor"], hand.factor, rtol=1e-4)
        np.testing.assert_allclose(cell["prot_background_probability"], hand.background, rtol=1e-4)
        np.testing.assert_allclose(cell["prot_phi"], hand.phi, rtol=1e-5)
    if joint:
        weights = av.get.model(fitted, key).network.protein
        np.testing.assert_allclose(found["prot_prior_log_mean"], weights.prior_mean.detach())
        np.testing.assert_allclose(found["prot_prior_log_scale"], weights.prior_log_scale.detach().exp(), rtol=1e-6)
        assert found["prot_prior_log_mean"].dims == ("panel", "prot_var")
        assert found["panel"].values.tolist() == ["batch_0", "batch_1", "batch_2"]


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_every_likelihood_and_dispersion(likelihood, dispersion):
    if likelihood == "normal" and dispersion in ("gene-label", "gene-cell"):
        pytest.skip("this combination is not built")
    mdata = cite(n_genes=20)
    verb = av.tl.scvi if dispersion != "gene-label" else av.tl.scanvi
    verb(mdata, gene_likelihood=likelihood, dispersion=dispersion, batch_key="batch", max_epochs=1)
    found = av.get.likelihood_parameters(mdata)
    spread = {"poisson": None, "normal": "rna_scale"}.get(likelihood, "rna_theta")
    assert set(found) == {"rna_mean"} | ({spread} - {None}) | (
        {"rna_zero_probability"} if likelihood == "zinb" else set()
    )
    if spread is None:
        return
    axis = {"gene": None, "gene-batch": "batch", "gene-label": "label", "gene-cell": "obs"}[dispersion]
    assert found[spread].dims == ((axis, "rna_var") if axis else ("rna_var",))
    for name, hand in hands(mdata, None).items():
        where = {}
        if dispersion == "gene-batch":
            where = {"batch": mdata.obs["batch"][name]}
        if dispersion == "gene-label":
            assert found["label"].values.tolist() == [*av.get.model(mdata).classes, "Unknown"]
            where = {"label": mdata.obs["cell_type"][name]}
        if dispersion == "gene-cell":
            where = {"obs": name}
        np.testing.assert_allclose(found[spread].sel(where), hand.theta, rtol=1e-4)


def test_proteins_by_batch_and_efficiency():
    mdata = cite(n_genes=20)
    av.tl.totalvi(mdata, batch_key="batch", protein_dispersion="protein-batch", objective="scvi-tools", max_epochs=1)
    found = av.get.likelihood_parameters(mdata, modality="prot")
    assert not any(name.startswith("rna") for name in found)
    assert found["prot_phi"].dims == found["prot_efficiency"].dims == ("batch", "prot_var")
    for name, hand in hands(mdata, None).items():
        np.testing.assert_allclose(found["prot_phi"].sel(batch=mdata.obs["batch"][name]), hand.phi, rtol=1e-5)
    log_efficiency = av.get.model(mdata).network.protein.log_efficiency.detach()
    np.testing.assert_allclose(found["prot_efficiency"], log_efficiency.exp(), rtol=1e-6)


def test_some_features(fitted):
    whole = av.get.likelihood_parameters(fitted, model="totalvi")
    some = av.get.likelihood_parameters(fitted, model="totalvi", features=["P07", "G009", "G002"])
    for name in whole:
        mod = name.partition("_")[0]
        wanted = {"rna": ["G009", "G002"], "prot": ["P07"]}[mod]
        np.testing.assert_allclose(some[name], whole[name].sel({f"{mod}_var": wanted}), rtol=1e-4)


def test_library_size(fitted):
    size = av.get.library_size(fitted, model="scvi")
    assert size.index.equals(fitted["rna"].obs_names) and size.name == "scvi_library_size"
    np.testing.assert_allclose(size, fitted["rna"].X.sum(1).A1, rtol=1e-6)


def test_size_factors():
    mdata = cite(n_genes=20)
    mdata.obs["factor"] = np.linspace(0.5, 2, 300)
    av.tl.scvi(mdata, size_factor_key="factor", max_epochs=1)
    found, total = av.get.library_size(mdata), mdata["rna"].X.sum()
    factor = mdata.obs["factor"].to_numpy()
    np.testing.assert_allclose(found, factor * total / factor.sum(), rtol=1e-5)  # in counts, whatever their unit was
    expected = av.tl.denoise(mdata, library_size="observed", inplace=False)["rna"]
    np.testing.assert_allclose(av.get.likelihood_parameters(mdata)["rna_mean"], expected, rtol=1e-5)
