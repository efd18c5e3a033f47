"""The RNA decoder: rates, dispersions and the likelihood of a cell's counts."""

import numpy as np
import pytest
import reference
import torch
from networks import (
    N_BATCHES,
    N_CATEGORIES,
    N_CONTINUOUS,
    N_GENES,
    N_LABELS,
    array,
    make_batch,
    make_config,
    make_network,
)

from anvi.nn import Draws
from anvi.nn.rna import RNARates


def decode(n_cells: int = 6, seed: int = 0, **options):
    """A decoder, its rates for random latent vectors, and the minibatch."""
    model = "scanvi" if options.get("dispersion") == "gene-label" else "scvi"
    network = make_network(make_config(model, **options), seed)
    batch = make_batch(network.config, n_cells, n_labelled=n_cells - 1 if model == "scanvi" else 0)
    z = torch.randn(n_cells, network.config.n_latent, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rates, _ = network.decode(z, batch, Draws())
    return network.rna, rates, batch


def by_loops(likelihood: str, x, mean, theta, zero) -> np.ndarray:
    """Log-probability of each cell."""
    given = {
        "nb": lambda: reference.nb_log_prob(x, mean, theta),
        "zinb": lambda: reference.zinb_log_prob(x, mean, theta, zero),
        "poisson": lambda: reference.poisson_log_prob(x, mean),
        "normal": lambda: reference.normal_log_prob(x, mean, theta),
    }
    return given[likelihood]().sum(1)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_log_prob_is_the_sum_over_genes(likelihood, dispersion):
    if likelihood == "normal":
        dispersion = "gene"  # Config refuses the rest
    decoder, rates, batch = decode(gene_likelihood=likelihood, dispersion=dispersion)
    zero = None if rates.zero_logits is None else array(rates.zero_logits)
    mean = np.exp(array(batch.log_library + rates.log_scale))
    value = decoder.log_prob(batch, rates, batch.log_library)
    expected = by_loops(likelihood, array(batch.x), mean, np.exp(array(rates.log_theta)), zero)
    np.testing.assert_allclose(array(value), expected, rtol=1e-11)  # float64; log-gammas cancel


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("rows", [0, 4])
def test_gradients_of_log_prob(likelihood, rows):
    """With one row of dispersions for all cells, and with a row per cell."""
    rng = np.random.default_rng(2)
    decoder, _, batch = decode(4, gene_likelihood=likelihood)
    given = [rng.normal(-1, 0.7, (4, N_GENES)), rng.normal(0, 0.7, (rows, N_GENES) if rows else N_GENES)]
    if likelihood == "zinb":
        given.append(rng.normal(0, 1, (4, N_GENES)))
    tensors = [torch.tensor(part, requires_grad=True) for part in given]
    rates = RNARates(tensors[0], tensors[1], tensors[2] if likelihood == "zinb" else None)
    weight = rng.normal(size=4)  # cells do not count alike
    (torch.tensor(weight) * decoder.log_prob(batch, rates, batch.log_library)).sum().backward()
    x, log_library = array(batch.x), array(batch.log_library)

    def value(log_scale, log_theta, zero=None):
        return weight * by_loops(likelihood, x, np.exp(log_library + log_scale), np.exp(log_theta), zero)

    for i, tensor in enumerate(tensors):
        if likelihood == "poisson" and i == 1:
            assert tensor.grad is None  # no dispersion
            continue
        numerical = reference.numerical_gradient(
            lambda part, i=i: value(*given[:i], part, *given[i + 1 :]), given[i], step=1e-5
        )
        # central differences with a step of 1e-5: truncation 1e-10 of third derivatives, rounding 1e-9
        np.testing.assert_allclose(tensor.grad.numpy(), numerical, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("log_mean", [-60.0, -20.0, 11.5])
@pytest.mark.parametrize("log_theta", [-12.0, 0.0, 18.4])
def test_extreme_rates_stay_finite_in_single_precision(likelihood, log_mean, log_theta):
    decoder, _, batch = decode(2, gene_likelihood=likelihood)
    x = torch.tensor([0.0, 1.0, 2.0, 1_000.0, 100_000.0])
    batch = batch._replace(x=x.repeat(2, 1))
    parts = [torch.full((2, N_GENES), log_mean), torch.full((N_GENES,), log_theta), torch.zeros(2, N_GENES)]
    parts = [part.requires_grad_() for part in parts]
    rates = RNARates(*parts[:2], parts[2] if likelihood == "zinb" else None)
    value = decoder.log_prob(batch, rates, torch.zeros(2, 1))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(part.grad).all() for part in parts if part.grad is not None)


@pytest.mark.parametrize("log_mean", [np.log(1e-9), 0.0, np.log(1e5)])
@pytest.mark.parametrize("theta", [1e-4, 1.0, 1e8])
def test_extreme_rates_in_double_precision(log_mean, theta):
    decoder, _, batch = decode(1)
    x = torch.tensor([[0.0, 1.0, 2.0, 1_000.0, 100_000.0]], dtype=torch.float64)
    scale = torch.full((1, N_GENES), log_mean, dtype=torch.float64)
    rates = RNARates(scale, torch.full((N_GENES,), np.log(theta), dtype=torch.float64), None)
    value = decoder.log_prob(batch._replace(x=x), rates, torch.zeros(1, 1, dtype=torch.float64))
    exact = reference.nb_log_prob_products(x.numpy(), np.exp(log_mean), theta).sum()
    # log-gamma of 1e8 is 1.7e9, its rounding 2e-7, and pairs of them are subtracted
    assert float(value.detach()) == pytest.approx(exact, rel=1e-11, abs=1e-5 if theta == 1e8 else 1e-8)


def test_eps_is_a_floor_under_the_mean():
    decoder, rates, batch = decode()
    value = decoder.log_prob(batch, rates, batch.log_library, eps=0.1)
    mean = np.exp(array(batch.log_library + rates.log_scale)) + 0.1
    expected = reference.nb_log_prob(array(batch.x), mean, np.exp(array(rates.log_theta))).sum(1)
    np.testing.assert_allclose(array(value), expected, rtol=1e-11)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_shares_sum_to_one_and_those_of_a_size_factor_do_not():
    _, rates, _ = decode()
    torch.testing.assert_close(rates.log_scale.exp().sum(1), torch.ones(6, dtype=torch.float64))
    decoder, rates, _ = decode(library="size_factor")
    assert not decoder.normalised
    assert ((rates.log_scale.exp().sum(1) - 1).abs() > 1e-3).all()


def test_only_zinb_has_logits_of_extra_zeros():
    for likelihood in ("nb", "poisson", "normal"):
        decoder, rates, _ = decode(gene_likelihood=likelihood)
        assert decoder.zero is None
        assert rates.zero_logits is None
    _, rates, _ = decode(gene_likelihood="zinb")
    assert rates.zero_logits.shape == (6, N_GENES)


def test_the_heads_of_the_protein_models_see_latent_vector_and_covariates_once_more():
    plain, joint = (make_network(make_config(model)).rna.scale for model in ("scvi", "totalvi"))
    config = make_config("scvi")
    assert plain.weight.shape[1] == config.n_hidden
    assert plain.covariates is None
    assert joint.weight.shape[1] == config.n_hidden + config.n_latent + N_CONTINUOUS
    assert len(joint.covariates) == N_BATCHES + N_CATEGORIES[0]


def test_the_extra_zeros_of_a_protein_model_are_read_off_the_features_of_the_mixture():
    network = make_network(make_config("totalvi", gene_likelihood="zinb"))
    batch = make_batch(network.config)
    z = torch.ones(5, network.config.n_latent, dtype=torch.float64)
    rna, _ = network.decode(z, batch, Draws())
    inputs = list(network.protein.mixing_trunk.parameters())
    own = list(network.rna.trunk.parameters())
    grads = torch.autograd.grad(rna.zero_logits.sum(), inputs + own, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in grads[: len(inputs)])
    assert all(gradient is None for gradient in grads[len(inputs) :])


# --- dispersions -----------------------------------------------------------------------------------------------------


def test_a_dispersion_per_gene_is_shared_by_all_cells():
    decoder, rates, _ = decode()
    assert torch.equal(rates.log_theta, decoder.log_theta[0])


def test_a_dispersion_per_batch_or_label_is_that_of_the_cell():
    decoder, rates, batch = decode(dispersion="gene-batch")
    assert torch.equal(rates.log_theta, decoder.log_theta[batch.batch])
    decoder, rates, batch = decode(dispersion="gene-label")
    assert decoder.log_theta.shape == (N_LABELS + 1, N_GENES)
    assert torch.equal(rates.log_theta[:-1], decoder.log_theta[batch.label[:-1]])
    assert batch.label[-1] == -1
    assert torch.equal(rates.log_theta[-1], decoder.log_theta[N_LABELS])  # the row of the unlabelled


def test_a_dispersion_per_batch_learns_from_its_own_cells_only():
    decoder, rates, batch = decode(dispersion="gene-batch")
    decoder.log_prob(batch, rates, batch.log_library)[batch.batch == 1].sum().backward()
    assert (decoder.log_theta.grad[0] == 0).all()
    assert (decoder.log_theta.grad[1] != 0).all()


def test_labels_may_have_dispersions_and_nothing_else():
    network = make_network(make_config("scvi", dispersion="gene-label", n_dispersion_labels=3))
    assert network.labels is None
    batch = make_batch(network.config, n_labelled=5)
    z = torch.zeros(5, network.config.n_latent, dtype=torch.float64)
    rates, _ = network.decode(z, batch, Draws())
    assert network.rna.log_theta.shape == (3, N_GENES)
    assert torch.equal(rates.log_theta, network.rna.log_theta[batch.label])


def test_a_dispersion_per_cell_is_decoded():
    decoder, rates, _ = decode(dispersion="gene-cell")
    assert decoder.log_theta is None
    assert rates.log_theta.shape == (6, N_GENES)
    assert (rates.log_theta[0] != rates.log_theta[1]).all()


def test_dispersions_start_standard_normal():
    config = make_config("scvi", dispersion="gene-batch", n_genes=2_000)
    decoder = make_network(config).rna
    decoder.reset(torch.Generator().manual_seed(0))
    log_theta = decoder.log_theta.detach()
    # five standard errors of 4,000 draws
    assert float(log_theta.mean()) == pytest.approx(0, abs=5 / 4_000**0.5)
    assert float(log_theta.std()) == pytest.approx(1, abs=5 / 8_000**0.5)
