"""The joined network: its terms against the bound put together by loops, masks, and what does not depend on what."""

import json

import numpy as np
import pytest
import reference
import torch
from networks import (
    MODELS,
    N_PROTEINS,
    FixedDraws,
    Naive,
    array,
    draws_of,
    make_batch,
    make_config,
    make_network,
    make_noise,
)

from anvi.nn import VAE, Config, Draws, negative_elbo

VARIANTS = {
    "scvi": {},
    "scvi zinb": {"gene_likelihood": "zinb"},
    "scvi poisson": {"gene_likelihood": "poisson"},
    "scvi normal": {"gene_likelihood": "normal"},
    "scvi ln": {"latent_distribution": "ln"},
    "scvi latent library": {"library": "latent"},
    "scvi size factor": {"library": "size_factor"},
    "scvi gene-batch": {"dispersion": "gene-batch"},
    "scvi gene-cell": {"dispersion": "gene-cell"},
    "scvi not encoded, not deep": {
        "encode_covariates": False,
        "deeply_inject_covariates": False,
        "n_layers_decoder": 2,
    },
    "scvi layer norm": {"use_layer_norm": "both", "use_batch_norm": "decoder", "n_layers_encoder": 2},
    "scanvi": {},
    "scanvi gene-label": {"dispersion": "gene-label"},
    "scanvi linear": {"linear_classifier": True, "label_prior": "learned"},
    "totalvi": {},
    "totalvi zinb": {"gene_likelihood": "zinb"},
    "totalvi dispersions": {"dispersion": "gene-batch", "protein_dispersion": "protein-batch"},
    "totalvi exp, efficiency": {"background_scale": "exp", "efficiency": True},
    "totalanvi": {"n_layers_encoder": 2},
    "totalanvi latent library": {"library": "latent"},
    "totalanvi size factor": {"library": "size_factor", "gene_likelihood": "zinb"},
}


def build(variant: str, n_labelled: int = 0, **options):
    """Network, minibatch and noise of a variant."""
    config = make_config(variant.split()[0], **VARIANTS.get(variant, {}) | options)
    batch = make_batch(config, n_labelled=n_labelled)
    if config.library == "size_factor":
        batch = batch._replace(log_library=batch.log_library + 0.5)
    return make_network(config), batch, make_noise(config, batch)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_are_the_bound_put_together_by_loops(variant):
    labelled = 2 if "anvi" in variant else 0
    network, batch, noise = build(variant, labelled)
    terms = network.terms(batch, None, draws_of(noise, batch))
    naive = Naive(network)
    for n in range(len(batch.x)):
        parts = naive.bound(batch, noise, n)
        expected = reference.cell_bound(**parts, label=int(batch.label[n]) if labelled else None)
        # float64 on both sides: rounding, grown by the cancellation of log-gammas of up to 1e3
        assert float(negative_elbo(terms)[n]) == pytest.approx(-expected, rel=1e-11, abs=1e-10)
        assert float(terms.reconstruction_rna[n]) == pytest.approx(-parts["log_px"], rel=1e-11, abs=1e-10)
        if terms.reconstruction_protein is not None:
            assert float(terms.reconstruction_protein[n]) == pytest.approx(-parts["log_py"], rel=1e-11, abs=1e-10)
            assert float(terms.kl_background[n]) == pytest.approx(parts["kl_background"], rel=1e-11, abs=1e-10)
        if terms.kl_library is not None:
            assert float(terms.kl_library[n]) == pytest.approx(parts["kl_library"], rel=1e-11, abs=1e-10)


@pytest.mark.parametrize("model", MODELS)
def test_a_term_that_the_model_lacks_is_none(model):
    network, batch, noise = build(model, 2 if "anvi" in model else 0)
    terms = network.terms(batch, None, draws_of(noise, batch))
    there = {name for name, value in terms._asdict().items() if value is not None}
    expected = {"reconstruction_rna", "kl_z", "z"}
    if "anvi" in model:
        expected |= {"kl_u", "kl_label", "logits", "target", "target_weight"}
    if "total" in model:
        expected |= {"reconstruction_protein", "kl_background"}
    assert there == expected


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["totalvi", "totalanvi"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("objective", ["bound", "scvi-tools"])
@pytest.mark.parametrize("stand_in", [7.0, 1e6, float("nan"), float("inf"), -1.0])
def test_what_stands_in_place_of_a_missing_protein_changes_no_bit(model, train, objective, stand_in):
    def run(value):
        # no efficiency: its penalty, which scvi-tools does not mask, knows no counts
        network, batch, noise = build(model, 2 if model == "totalanvi" else 0, objective=objective)
        batch = batch._replace(y=torch.where(batch.measured, batch.y, value))
        network.train(train)
        draws = draws_of(noise, batch._replace(n_labelled=0) if objective == "scvi-tools" else batch)
        terms = network.terms(batch, None, draws)
        negative_elbo(terms).sum().backward()
        out = {name: part.detach() for name, part in terms._asdict().items() if part is not None}
        out |= {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
        network.eval()
        return out | {"latent": network.encode(batch, Draws()).mean.detach()}

    zero, other = run(0.0), run(stand_in)
    assert zero.keys() == other.keys()
    for name, value in zero.items():
        assert torch.equal(value, other[name]), name


def test_a_cell_without_proteins_has_no_protein_terms_and_others_keep_theirs():
    network, batch, noise = build("totalvi")
    terms = network.terms(batch, None, draws_of(noise, batch))
    assert not batch.measured[-1].any()
    assert terms.reconstruction_protein[-1] == 0
    assert terms.kl_background[-1] == 0
    assert (terms.reconstruction_protein[0] > 0) & (terms.kl_background[0] > 0)


def test_the_mean_of_the_encoder_input_is_over_measured_proteins_only():
    network, batch, _ = build("totalvi")
    features = array(network.features(batch))[:, -N_PROTEINS - 1 : -1]
    expected = reference.protein_input(array(batch.y), batch.measured.numpy())
    np.testing.assert_allclose(features, expected, rtol=1e-14)


def test_the_incumbents_mean_is_over_all_proteins():
    network, batch, _ = build("totalvi", objective="scvi-tools")
    features = array(network.features(batch))[:, -N_PROTEINS - 1 : -1]
    expected = reference.protein_input(array(batch.y), np.ones(batch.measured.shape, bool))
    np.testing.assert_allclose(features, expected, rtol=1e-14)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
def test_a_labelled_cell_is_conditioned_on_its_own_class_only(model):
    network, batch, noise = build(model, n_labelled=1, n_hidden=16)  # wide, so that some unit is awake for each class
    own = int(batch.label[0])
    negative_elbo(network.terms(batch, None, draws_of(noise, batch)))[0].backward()
    for part in ("encode_u", "decode_u"):
        for i, linear in enumerate(getattr(network.labels, part).stack.linear):
            moved = linear.covariates.grad.abs().sum(1)  # (classes,)
            others = torch.arange(len(moved)) != own
            assert (moved[others] == 0).all(), (part, i)
            assert moved[own] > 0, (part, i)


@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
def test_an_unlabelled_cell_is_averaged_over_all_classes(model):
    network, batch, noise = build(model, n_labelled=1, n_hidden=16)  # wide, so that some unit is awake for each class
    negative_elbo(network.terms(batch, None, draws_of(noise, batch)))[1].backward()
    for part in ("encode_u", "decode_u"):
        assert (getattr(network.labels, part).stack.linear[0].covariates.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
def test_the_bound_of_a_labelled_cell_does_not_depend_on_the_classifier(model):
    network, batch, noise = build(model, n_labelled=2)
    bound = negative_elbo(network.terms(batch, None, draws_of(noise, batch)))
    weights = [p for name, p in network.named_parameters() if name.startswith("labels.classifier")]
    assert weights
    labelled = torch.autograd.grad(bound[0], weights, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in labelled)
    unlabelled = torch.autograd.grad(bound[2], weights, allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in unlabelled)
    with torch.no_grad():
        for parameter in weights:
            parameter.mul_(-2)
    again = negative_elbo(network.terms(batch, None, draws_of(noise, batch)))
    assert torch.equal(again[:2], bound[:2])
    assert (again[2:] != bound[2:]).all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("n_labelled", [0, 5])
def test_all_or_none_of_the_cells_may_be_labelled(n_labelled, train):
    network, batch, noise = build("totalanvi", n_labelled=n_labelled)
    assert len(batch.x) == 5
    network.train(train)
    terms = network.terms(batch, None, draws_of(noise, batch))
    negative_elbo(terms).sum().backward()
    assert torch.isfinite(negative_elbo(terms)).all()
    assert (terms.logits is None) == (n_labelled == 0)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("objective", ["bound", "scvi-tools"])
def test_further_labelled_cells_are_classified_at_their_mean(objective):
    network, batch, noise = build("totalanvi", objective=objective)
    further = make_batch(network.config, n_cells=4, n_labelled=4, seed=5)
    terms = network.terms(batch, further, draws_of(noise, batch))
    alone = network.terms(batch, None, draws_of(noise, batch))
    # one pass or two are the same in eval mode but for the order of sums in a matrix product
    torch.testing.assert_close(terms.logits, network.logits(further, Draws()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(negative_elbo(terms), negative_elbo(alone), rtol=1e-12, atol=1e-12)
    assert torch.equal(terms.target, further.label)
    assert alone.logits is None


def test_without_further_cells_the_labelled_ones_of_the_minibatch_are_classified():
    network, batch, noise = build("scanvi", n_labelled=2)
    terms = network.terms(batch, None, draws_of(noise, batch))
    torch.testing.assert_close(terms.logits, network.logits(batch, Draws())[:2], rtol=1e-12, atol=1e-12)
    assert torch.equal(terms.target, batch.label[:2])


# --- library, latent space, weights ----------------------------------------------------------------------------------


def test_a_latent_library_is_drawn_and_the_observed_one_ignored():
    network, batch, noise = build("scvi latent library")
    terms = network.terms(batch, None, draws_of(noise, batch))
    shifted = network.terms(batch._replace(log_library=batch.log_library + 1), None, draws_of(noise, batch))
    assert torch.equal(terms.reconstruction_rna, shifted.reconstruction_rna)


def test_the_latent_library_of_a_protein_model_is_bounded():
    network, batch, _ = build("totalanvi latent library")
    sample, _ = network.log_library(batch, FixedDraws(torch.full((5, 1), 1e6)))
    assert (sample == 15).all()


def test_a_size_factor_scales_the_rates():
    network, batch, _ = build("scvi size factor")
    z = torch.zeros(5, network.config.n_latent, dtype=torch.float64)
    rna, _ = network.decode(z, batch, Draws())
    assert (rna.log_scale.exp().sum(1) != 1).all()
    assert torch.equal(network.log_library(batch, Draws())[0], batch.log_library)


def test_a_logistic_normal_latent_lies_in_the_simplex():
    network, batch, noise = build("scvi ln")
    terms = network.terms(batch, None, draws_of(noise, batch))
    torch.testing.assert_close(terms.z.sum(1), torch.ones(5, dtype=torch.float64))
    assert (terms.z > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_takes_part(variant):
    network, batch, noise = build(variant, 2 if "anvi" in variant else 0, n_layers_encoder=2)
    # more cells, so that no unit of a stack is dead and no category is absent
    batch = make_batch(network.config, n_cells=40, n_labelled=20 if "anvi" in variant else 0, seed=3)
    terms = network.terms(batch, None, draws_of(make_noise(network.config, batch), batch))
    total = negative_elbo(terms).sum()
    if terms.logits is not None:
        total = total + terms.logits.square().sum()
    total.backward()
    fixed = {"labels.log_prior"} if network.config.label_prior != "learned" else set()
    if network.config.gene_likelihood == "poisson":
        fixed.add("rna.log_theta")
    idle = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == fixed & dict(network.named_parameters()).keys()


@pytest.mark.parametrize("model", MODELS)
def test_the_start_is_reproducible_and_leaves_the_global_state_alone(model):
    config = make_config(model)
    before = torch.random.get_rng_state()
    one, two, other = (VAE(config, torch.Generator().manual_seed(seed)).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["encoder.stack.linear.0.weight"], other["encoder.stack.linear.0.weight"])
    assert all(torch.isfinite(value).all() for value in one.values())


def test_a_training_pass_leaves_the_global_state_alone_and_is_reproducible():
    config = make_config("totalanvi", dropout_encoder=0.3, dropout_decoder=0.3, dropout_u=0.3)
    batch = make_batch(config, n_cells=8, n_labelled=4)
    before = torch.random.get_rng_state()

    def run(seed):
        network = make_network(config).train()
        terms = network.terms(batch, batch._replace(n_labelled=8), Draws(torch.Generator().manual_seed(seed)))
        return negative_elbo(terms).detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_configuration_survives_json_and_rebuilds_the_network():
    config = make_config("totalanvi", dispersion="gene-label", efficiency=True)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    network, copy = make_network(config), VAE(again).double()
    copy.load_state_dict(network.state_dict())
    batch = make_batch(config)
    assert torch.equal(copy.eval().encode(batch, Draws()).mean, network.encode(batch, Draws()).mean)
