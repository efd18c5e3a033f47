import numpy as np
import pytest
import torch
from helpers import cite, mudata_of

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop
from anvi._fit.start import lower_component, make_config, make_network

PAIRS = [("scvi", "scanvi"), ("totalvi", "totalanvi")]


@pytest.fixture
def spied(monkeypatch):
    """What a fit begins and ends with: `before`, `after` and `plan`."""
    seen = {}
    original = loop.fit

    def fit(network, cells, train, validation, plan, **options):
        seen["before"] = {name: value.clone() for name, value in network.state_dict().items()}
        seen["plan"] = plan
        history = original(network, cells, train, validation, plan, **options)
        seen["after"] = {name: value.clone() for name, value in network.state_dict().items()}
        return history

    monkeypatch.setattr("anvi.tl._fit.fit", fit)
    return seen


def refit(fitted, source, name, **options):
    getattr(av.tl, name)(fitted, init=source, batch_key="batch", key_added="second", **{"max_epochs": 2} | options)


@pytest.mark.parametrize(("source", "name"), PAIRS)
class TestInit:
    def test_starts_from_the_shared_weights(self, fitted, spied, source, name):
        refit(fitted, source, name)
        theirs = av.get.model(fitted, source).network.state_dict()
        for part, value in theirs.items():
            assert torch.equal(spied["before"][part], value), part
        assert {part for part in spied["before"] if part not in theirs} == {
            part for part in spied["before"] if part.startswith("labels.")
        }

    def test_everything_but_the_background_prior_moves(self, fitted, spied, source, name):
        refit(fitted, source, name)
        frozen = {"protein.prior_mean", "protein.prior_log_scale"} if source == "totalvi" else set()
        still = {part for part, value in spied["before"].items() if torch.equal(value, spied["after"][part])}
        assert still == frozen | {"labels.log_prior"}  # a uniform label prior is no parameter

    def test_the_background_prior_moves_without_init(self, fitted, spied, source, name):
        getattr(av.tl, name)(fitted, batch_key="batch", key_added="second", max_epochs=2)
        if source == "totalvi":
            for part in ("protein.prior_mean", "protein.prior_log_scale"):
                assert not torch.equal(spied["before"][part], spied["after"][part])

    def test_label_nets_alone(self, fitted, spied, source, name):
        refit(fitted, source, name, train="label_nets")
        for part, value in spied["before"].items():  # statistics of the batch norms included
            moved = part.startswith("labels.") and part != "labels.log_prior"
            assert torch.equal(value, spied["after"][part]) != moved, part
        latent = fitted["rna"].obsm if name == "scanvi" else fitted.obsm
        np.testing.assert_array_equal(latent["X_second"], latent[f"X_{source}"])

    def test_no_second_warmup(self, fitted, spied, source, name):
        refit(fitted, source, name)
        assert spied["plan"].warmup == 0
        home = fitted["rna"] if name == "scanvi" else fitted
        assert (home.uns["second"]["history"]["kl_weight"] == (0.1 if name.endswith("anvi") else 1)).all()

    def test_a_model_object_will_do(self, fitted, spied, source, name):
        refit(fitted, av.get.model(fitted, source), name)
        one = spied["after"]
        refit(fitted, source, name)
        for part, value in one.items():
            assert torch.equal(value, spied["after"][part]), part

    def test_the_source_stays_as_it_was(self, fitted, source, name):
        model = av.get.model(fitted, source)
        before = {part: value.clone() for part, value in model.network.state_dict().items()}
        refit(fitted, model, name)
        for part, value in before.items():
            assert torch.equal(value, model.network.state_dict()[part]), part

    def test_architecture_is_inherited(self, fitted, spied, source, name):
        getattr(av.tl, source)(fitted, batch_key="batch", max_epochs=1, n_latent=7, n_hidden=24)
        refit(fitted, source, name, linear_classifier=True)
        config = av.get.model(fitted, "second").config
        assert (config.n_latent, config.n_hidden, config.linear_classifier) == (7, 24, True)

    def test_contradicting_option(self, fitted, no_training, source, name):
        with pytest.raises(ValueError, match=r"n_latent=3 contradicts the model that init= starts from"):
            refit(fitted, source, name, n_latent=3)

    def test_other_genes(self, fitted, no_training, source, name):
        other = cite(n_genes=50)
        with pytest.raises(ValueError, match=r"init= needs a model of the same genes: it has 60 .*, this fit 50"):
            refit(other, av.get.model(fitted, source), name)

    def test_the_same_genes_in_another_order(self, fitted, source, name):
        """Also where only some are asked for, by name; weights go with names."""
        other = mudata_of({"rna": fitted["rna"][:, ::-1].copy(), "prot": fitted["prot"]}, fitted)
        model, data = av.get.model(fitted, source), fitted.copy()
        refit(data, model, name)
        for genes in ("auto", list(other["rna"].var_names)):
            refit(other, model, name, genes=genes)
            one, two = (av.get.model(part, "second") for part in (data, other))
            assert one.setup.genes == two.setup.genes
            assert all(
                np.array_equal(weights, two.weights()[slot], equal_nan=True) for slot, weights in one.weights().items()
            )

    def test_other_batches(self, fitted, no_training, source, name):
        with pytest.raises(ValueError, match=r"init= needs a model of the same batches"):
            getattr(av.tl, name)(fitted, init=source, key_added="second", max_epochs=1)

    def test_unknown_part(self, fitted, no_training, source, name):
        with pytest.raises(ValueError, match=r"train='lable_nets' is not one of 'all', 'label_nets'"):
            refit(fitted, source, name, train="lable_nets")
        for train, message in (("lable_nets", "is not one of"), ("label_nets", "needs init=")):
            with pytest.raises(ValueError, match=message):
                getattr(av.tl, name)(fitted, train=train, max_epochs=1)


def test_init_from_the_other_family(fitted, no_training):
    with pytest.raises(ValueError, match="init= needs a model of the same proteins"):
        refit(fitted, "scvi", "totalanvi")


def test_init_that_is_not_there(fitted, no_training):
    with pytest.raises(KeyError, match=r"init='totalvy' is no fitted model.*'totalvi'"):
        refit(fitted, "totalvy", "totalanvi")


# what the data decide ---------------------------------------------------------------------------------------------


def network_of(mdata, name="totalanvi", **options):
    labels_key = "cell_type" if name.endswith("anvi") else None
    setup = find_setup(mdata, proteins="total" in name, labels_key=labels_key, batch_key="batch")
    cells = read_cells(mdata, setup, labels=True)
    return make_network(make_config(name, setup, options), cells, 0), cells, setup


def test_sizes_come_from_the_data():
    network, _, _ = network_of(cite())
    config = network.config
    assert (config.n_genes, config.n_proteins, config.n_labels, config.n_batches, config.n_panels) == (60, 20, 6, 3, 3)


def test_library_prior_is_that_of_each_batch():
    network, cells, _ = network_of(cite(), "scvi", library="latent")
    for code in range(3):
        values = cells.log_library[cells.batch == code].numpy().astype(np.float64)
        assert network.library_mean[code] == pytest.approx(values.mean(), rel=1e-6)
        assert network.library_var[code] == pytest.approx(values.var(), rel=1e-5)


@pytest.mark.parametrize("prior", ["uniform", "empirical", "learned"])
def test_label_prior(prior):
    network, cells, setup = network_of(cite(), label_prior=prior)
    counts = np.array([int((cells.label == code).sum()) + 1 for code in range(len(setup.classes))])
    expected = np.full(6, 1 / 6) if prior == "uniform" else counts / counts.sum()
    np.testing.assert_allclose(network.labels.log_prior.detach().exp(), expected, rtol=1e-5)
    assert network.labels.log_prior.requires_grad == (prior == "learned")


def test_size_factor_and_latent_library_exclude_each_other():
    mdata = cite()
    mdata.obs["sf"] = 1.0
    setup = find_setup(mdata, proteins=False, size_factor_key="sf")
    assert make_config("scvi", setup, {}).library == "size_factor"
    with pytest.raises(ValueError, match="library='latent' and size_factor_key exclude each other"):
        make_config("scvi", setup, {"library": "latent"})


def test_a_mixture_of_one_lump_is_that_lump():
    """A cell whose proteins all have the same count has no second component; the empty one is not the lower."""
    mean, scale = lower_component(torch.full((2, 6), 1.5), torch.ones(2, 6, dtype=torch.bool))
    assert mean.tolist() == [1.5, 1.5] and scale.isfinite().all()


@pytest.mark.parametrize(("n_proteins", "from_data"), [(10, False), (11, True)])
def test_few_proteins_start_at_the_published_constants(n_proteins, from_data):
    network, _, _ = network_of(cite(n_proteins=n_proteins), "totalvi")
    mean, log_scale = network.protein.prior_mean, network.protein.prior_log_scale
    assert bool((mean == 3).all()) != from_data and bool((log_scale == 0).all()) != from_data
    assert (mean == mean[:, :1]).all()  # one value per panel


def test_a_model_with_another_dispersion_is_inherited_as_it_is():
    mdata = cite()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1, dispersion="gene-batch")
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1, init="totalvi")
    assert av.get.model(mdata, "totalanvi").config.dispersion == "gene-batch"


def test_efficiency_belongs_to_the_incumbents_objective():
    mdata = cite()
    with pytest.raises(ValueError, match="efficiency=True is built for objective='scvi-tools' only"):
        av.tl.totalvi(mdata, max_epochs=1, efficiency=True)
    av.tl.totalvi(mdata, max_epochs=1, objective="scvi-tools")
    assert av.get.model(mdata).network.protein.log_efficiency is not None
    with pytest.raises(TypeError, match="no option 'background_scale'"):
        av.tl.totalvi(mdata, max_epochs=1, background_scale="exp")
