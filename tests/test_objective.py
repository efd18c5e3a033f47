"""From terms to the number that is minimised: what is weighed by what, and cells that do not count."""

import pytest
import reference
import torch
from networks import MODELS, Naive, draws_of, make_batch, make_config, make_network, make_noise

from anvi.nn import Weights, loss, negative_elbo
from anvi.nn.objective import classification_loss, weighed_bound


def run(model: str, n_labelled: int = 2, objective: str = "bound", **options):
    """Terms of a minibatch, and all that made them."""
    config = make_config(model, objective=objective, **options)
    batch = make_batch(config, n_labelled=n_labelled if config.has_labels else 0)
    network, noise = make_network(config), make_noise(config, batch)
    rows = batch._replace(n_labelled=0) if objective == "scvi-tools" else batch
    return network.terms(batch, None, draws_of(noise, rows)), batch, network, noise


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_minus_the_mean_weighed_bound_plus_the_classification(model, kl_weight):
    terms, batch, network, noise = run(model)
    naive = Naive(network)
    bounds = []
    for n in range(len(batch.x)):
        label = int(batch.label[n]) if network.labels is not None else None
        bounds.append(reference.cell_bound(**naive.bound(batch, noise, n), label=label, kl_weight=kl_weight))
    expected = -sum(bounds) / len(bounds) + 50 * float(classification_loss(terms))
    value = loss(terms, batch.weight, Weights(kl=kl_weight), network.config)
    assert float(value) == pytest.approx(expected, rel=1e-11)  # float64 on both sides


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_the_kl_weight_multiplies_every_divergence_and_nothing_else(model):
    terms, _, network, _ = run(model, library="latent")
    none, half, full = (weighed_bound(terms, Weights(kl=w), network.config) for w in (0.0, 0.5, 1.0))
    reconstruction = terms.reconstruction_rna
    if terms.reconstruction_protein is not None:
        reconstruction = reconstruction + terms.reconstruction_protein
    assert torch.equal(none, reconstruction)
    torch.testing.assert_close(full, negative_elbo(terms), rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(half, (none + full) / 2, rtol=1e-13, atol=1e-12)
    for name in ("kl_z", "kl_u", "kl_label", "kl_library", "kl_background"):
        if getattr(terms, name) is not None:  # each of them moves the bound by its share
            more = terms._replace(**{name: getattr(terms, name) + 1})
            torch.testing.assert_close(weighed_bound(more, Weights(kl=0.5), network.config), half + 0.5)


@torch.no_grad()
@pytest.mark.parametrize("model", ["totalvi", "totalanvi"])
def test_the_protein_weight_multiplies_the_protein_likelihood_and_nothing_else(model):
    terms, _, network, _ = run(model)
    one, three = (weighed_bound(terms, Weights(protein=weight), network.config) for weight in (1.0, 3.0))
    torch.testing.assert_close(three - one, 2 * terms.reconstruction_protein, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_warm_up_weight_may_be_a_tensor():
    terms, batch, network, _ = run("totalanvi")
    value = loss(terms, batch.weight, Weights(kl=torch.tensor(0.3, dtype=torch.float64)), network.config)
    assert float(value) == float(loss(terms, batch.weight, Weights(kl=0.3), network.config))


# --- cells of weight 0 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("objective", ["bound", "scvi-tools"])
def test_a_cell_of_weight_zero_counts_in_nothing(model, objective):
    """What it is made of changes no bit of the loss and its gradients."""
    config = make_config(model, objective=objective)
    labelled = 3 if config.has_labels else 0
    padding = torch.tensor([False, True, False, False, False, True])  # a labelled and an unlabelled one
    weight = (~padding).double()
    batch = make_batch(config, 6, n_labelled=labelled)._replace(weight=weight)
    other = make_batch(config, 6, n_labelled=labelled, seed=9)

    def run(batch):
        network, noise = make_network(config), make_noise(config, batch)
        rows = batch._replace(n_labelled=0) if objective == "scvi-tools" else batch
        value = loss(network.terms(batch, None, draws_of(noise, rows)), batch.weight, Weights(), config)
        value.backward()
        return [value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    changed = {
        name: torch.where(padding.view(-1, *[1] * (value.dim() - 1)), getattr(other, name), value)
        for name, value in batch._asdict().items()
        if isinstance(value, torch.Tensor) and name != "weight"
    }
    one, two = run(batch), run(batch._replace(**changed))
    assert len(one) == len(two)
    # vectorised and left-over entries of a tensor may round otherwise, and padding moves the border between them
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_the_mean_is_over_the_cells_that_count(model):
    terms, batch, network, _ = run(model)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    if terms.logits is not None:
        terms = terms._replace(target_weight=weight[:2])
    per_cell = weighed_bound(terms, Weights(), network.config)
    expected = per_cell[[0, 2, 3]].mean()
    if terms.logits is not None:
        expected = expected + 50 * torch.nn.functional.cross_entropy(terms.logits[:1], terms.target[:1])
    torch.testing.assert_close(loss(terms, weight, Weights(), network.config), expected, rtol=1e-13, atol=1e-13)


# --- classification --------------------------------------------------------------------------------------------------


def test_without_labelled_cells_there_is_no_classification():
    terms, batch, network, _ = run("scanvi", n_labelled=0)
    assert terms.logits is None
    assert float(classification_loss(terms)) == 0
    one, other = (loss(terms, batch.weight, Weights(classification=ratio), network.config) for ratio in (0.0, 50.0))
    assert torch.equal(one, other)


def test_if_no_labelled_cell_counts_the_classification_is_zero():
    terms, _, _, _ = run("scanvi")
    value = classification_loss(terms._replace(target_weight=torch.zeros(2, dtype=torch.float64)))
    assert float(value.detach()) == 0


def test_the_classification_pulls_at_encoder_and_classifier():
    terms, _, network, _ = run("scanvi")
    classification_loss(terms).backward()
    pulled = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert pulled == {"encoder", "labels"}
    assert network.labels.encode_u.mean.weight.grad is None


# --- the incumbent ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_the_incumbents_groups(model):
    """Which term is warmed up in which class, as the specification lists it (3.1, 3.2, 3.3, 3.6)."""
    terms, _, network, _ = run(model, objective="scvi-tools", library="latent", efficiency="total" in model)
    warmed = {
        "scvi": {"kl_z"},
        "scanvi": {"kl_u", "kl_label", "kl_library"},
        "totalvi": {"reconstruction_protein", "kl_z", "kl_background", "penalty"},
        "totalanvi": {"reconstruction_protein", "kl_u", "kl_label", "kl_background", "penalty"},
    }[model]
    value = weighed_bound(terms, Weights(kl=0.25), network.config)
    names = ("reconstruction_rna", "reconstruction_protein", "kl_z", "kl_u", "kl_label", "kl_library", "kl_background")
    expected = sum(
        (0.25 if name in warmed else 1.0) * getattr(terms, name)
        for name in (*names, "penalty")
        if getattr(terms, name) is not None
    )
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
def test_the_incumbent_averages_labelled_cells_over_all_classes(model):
    terms, batch, network, noise = run(model, objective="scvi-tools")
    naive = Naive(network)
    for n in range(len(batch.x)):
        parts = naive.bound(batch, noise, n)
        expected = parts["class_probabilities"] @ parts["kl_u_by_class"]
        assert float(terms.kl_u[n]) == pytest.approx(expected, rel=1e-11)


@torch.no_grad()
def test_label_smoothing_spreads_a_share_of_each_label_over_all_classes():
    terms, _, network, _ = run("scanvi")
    log_p = terms.logits.log_softmax(-1)
    expected = 0.0
    for row, code in zip(log_p, terms.target, strict=True):
        wanted = [0.2 / len(row) + 0.8 * (c == int(code)) for c in range(len(row))]
        expected -= sum(w * float(value) for w, value in zip(wanted, row, strict=True)) / len(log_p)
    assert float(classification_loss(terms, 0.2)) == pytest.approx(expected, rel=1e-12)
    plain, smooth = (loss(terms, torch.ones(len(terms.z)), Weights(smoothing=s), network.config) for s in (0.0, 0.2))
    gap = 50 * (classification_loss(terms, 0.2) - classification_loss(terms))
    torch.testing.assert_close(smooth - plain, gap, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["scanvi", "totalanvi"])
@pytest.mark.parametrize("objective", ["bound", "scvi-tools"])
def test_labels_of_one_class_given_as_sets_change_nothing(model, objective):
    """Loss and gradients of a minibatch with labelled and unlabelled cells, told as codes and told as sets."""
    config = make_config(model, objective=objective)
    batch, further = make_batch(config, n_labelled=2), make_batch(config, n_labelled=5, seed=3)

    def told(batch):
        codes = batch.label.clamp(min=0)
        one = torch.nn.functional.one_hot(codes, config.n_labels).bool()
        return batch._replace(allowed=one | (batch.label < 0)[:, None])

    def run(batch, further):
        network, noise = make_network(config), make_noise(config, batch)
        rows = batch._replace(n_labelled=0) if objective == "scvi-tools" else batch
        value = loss(network.terms(batch, further, draws_of(noise, rows)), batch.weight, Weights(), config)
        value.backward()
        return [value.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]

    for more in (further, None):
        ours = run(told(batch), None if more is None else told(more))
        for a, b in zip(run(batch, more), ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
