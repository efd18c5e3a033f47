"""A widened network says of the reference's cells what it said before; a held one trains new rows and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import cite
from networks import FixedDraws, draws_of, make_batch, make_config, make_network, make_noise

from anvi._data.batches import split
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._fit import loop, surgery
from anvi._fit import start as starting
from anvi._fit.plan import Plan
from anvi.nn import VAE, Draws, negative_elbo

MODELS = ("scvi", "scanvi", "totalvi", "totalanvi")
OPTIONS = {
    "plain": {},
    "one batch": {"n_batches": 1, "n_panels": 1},
    "nothing injected": {"n_batches": 1, "n_categories": (1, 1)},
    "per batch": {"dispersion": "gene-batch", "protein_dispersion": "protein-batch"},
    "latent library": {"library": "latent", "gene_likelihood": "zinb"},
    "blind encoder": {"encode_covariates": False},
    "scvi-tools": {"objective": "scvi-tools", "efficiency": True},
}


def config_of(model, options):
    joint = "total" in model
    options = {key: value for key, value in options.items() if joint or key not in ("n_panels", "efficiency")}
    return make_config(model, **options)


def wider(config, batches=2, categories=1, panels=1):
    return replace(
        config,
        n_batches=config.n_batches + batches,
        n_categories=tuple(size + categories for size in config.n_categories),
        n_panels=config.n_panels + (panels if config.has_protein else 0),
    )


def rows_of(sizes):
    """Where each (covariate, category) is in a covariate table, by counting."""
    place = {}
    for covariate, size in enumerate(sizes):
        for category in range(size if size > 1 else 0):
            place[covariate, category] = len(place)
    return place


def recoded(batch, old, new):
    """The same cells with the codes of the widened network, cell by cell."""
    before, after = ((c.n_batches, *c.n_categories) for c in (old, new))
    name_of_row = {row: name for name, row in rows_of(before).items()}
    place, codes = rows_of(after), []
    for cell in range(len(batch.x)):
        category = dict.fromkeys(range(len(before)), 0)  # what has a single category is of that one
        if batch.codes is not None:
            category |= dict(name_of_row[row] for row in batch.codes[cell].tolist())
        codes.append([place[name] for name in category.items() if name in place])
    return batch._replace(codes=torch.tensor(codes) if codes[0] else None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("grown", [(2, 1, 1), (1, 0, 1), (0, 2, 0), (0, 0, 0)], ids=str)
def test_nothing_changes_for_the_cells_of_the_reference(model, options, grown):
    """Every term of the bound, bit for bit: neither where rows are nor what stands in the new ones may matter."""
    config = config_of(model, options)
    network = make_network(config, dtype=torch.float32)
    wide, tables = surgery.widen(network, wider(config, *grown))
    state = wide.state_dict()
    for table in tables:
        state[table.name][table.new] = torch.randn(int(table.new.sum()), state[table.name].shape[1])
    own = config.has_labels and config.objective == "bound"  # scvi-tools averages over the labels of labelled cells
    batch = make_batch(config, n_labelled=2 if own else 0, dtype=torch.float32)
    noise = make_noise(config, batch)
    with torch.no_grad():
        before = network.terms(batch, None, draws_of(noise, batch))
        again = recoded(batch, config, wide.config)
        after = wide.terms(again, None, draws_of(noise, batch))
        rates = [net.decode(before.z, cells, Draws()) for net, cells in ((network, batch), (wide, again))]
    for one, other in zip([*before, *flat(rates[0])], [*after, *flat(rates[1])], strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def flat(rates):
    return [part for group in rates if group is not None for part in group]


def test_rows_stay_with_their_category():
    """The batches' rows come first, so a new one moves all that follow: each is looked up by its name."""
    config = make_config("totalvi", n_categories=(3, 1, 2))
    network = make_network(config, dtype=torch.float32)
    new = replace(config, n_batches=4, n_categories=(3, 2, 4), n_panels=3)
    wide, tables = surgery.widen(network, new)
    old_rows, new_rows = rows_of((2, 3, 1, 2)), rows_of((4, 3, 2, 4))
    one, other = network.protein.fore.covariates, wide.protein.fore.covariates
    assert len(other) == 13
    for name, row in old_rows.items():
        assert torch.equal(other[new_rows[name]], one[row])
    assert (other[new_rows[2, 0]] == 0).all()  # the only category of its covariate had no row
    mean = lambda covariate, n: sum(one[old_rows[covariate, i]] for i in range(n)) / n
    for batch in (2, 3):
        torch.testing.assert_close(other[new_rows[0, batch]], mean(0, 2))
    torch.testing.assert_close(other[new_rows[3, 2]], mean(3, 2))
    assert (other[new_rows[2, 1]] == 0).all()
    by_name = {table.name: table.new for table in tables}
    expected = [name in ((0, 2), (0, 3), (2, 1), (3, 2), (3, 3)) for name in new_rows]
    assert by_name["protein.fore.covariates"].tolist() == expected
    assert not any(name.startswith("labels.") or "library" in name for name in by_name)


def test_a_new_panel_starts_at_what_panels_that_measured_the_protein_have_learnt():
    config = make_config("totalvi")
    network = make_network(config, dtype=torch.float32)
    measured = torch.tensor([[True, True, False], [True, False, False]])
    wide, _ = surgery.widen(network, replace(config, n_panels=3), measured)
    table = network.protein.prior_mean.detach()
    expected = [float(table[:, 0].mean()), float(table[0, 1]), float(table[:, 2].mean())]
    np.testing.assert_allclose(wide.protein.prior_mean[2].detach(), expected, rtol=1e-6)


def test_library_prior_of_new_batches():
    mdata = cite()
    setup = find_setup(mdata, proteins=False, batch_key="batch")
    cells = read_cells(mdata, setup)
    network = starting.make_network(starting.make_config("scvi", setup, {"library": "latent"}), cells, 0)
    with torch.no_grad():
        network.library_mean.zero_()
    starting.set_library_prior(network, cells, 1)
    counts = np.asarray(mdata["rna"].X.sum(1)).ravel()
    for code in (1, 2):
        logs = np.log(counts[(mdata.obs["batch"] == f"batch_{code}").to_numpy()])
        assert float(network.library_mean[code]) == pytest.approx(logs.mean(), rel=1e-5)
        assert float(network.library_var[code]) == pytest.approx(logs.var(), rel=1e-4)
    assert float(network.library_mean[0]) == 0  # the reference's own


# fewer genes ------------------------------------------------------------------------------------------------------

GENES = torch.tensor([4, 0, 2])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"gene_likelihood": "zinb", "dispersion": "gene-batch"}, {"dispersion": "gene-cell", "library": "latent"}],
    ids=str,
)
def test_a_narrow_network_is_the_whole_one_on_the_genes_that_are_there(model, options):
    """Against the whole network, whose encoder gets the features of the narrow one at the places of its genes."""
    config = make_config(model, **options)
    network = make_network(config, dtype=torch.float32)
    narrow = surgery.narrow(network, GENES)
    assert narrow.config == replace(config, n_genes=3)
    batch = make_batch(config, dtype=torch.float32)
    few = batch._replace(x=batch.x[:, GENES])
    x, features = few.x.numpy(), np.zeros((5, 5))
    if config.has_protein:
        x = x / (1 + x.mean(1, keepdims=True))  # the mean of what was measured
    features[:, GENES.numpy()] = np.log1p(x)
    with torch.no_grad():
        rest = network.features(batch)[:, 5:]  # proteins and continuous covariates
        whole = torch.cat([torch.tensor(features, dtype=torch.float32), rest], 1)
        for net, other in ((network.encoder, narrow.encoder), (network.library_encoder, narrow.library_encoder)):
            if net is not None:
                expected, found = net(whole, batch.codes, Draws()), other(narrow.features(few), few.codes, Draws())
                torch.testing.assert_close(found, expected)
        z = torch.randn(5, config.n_latent, generator=torch.Generator().manual_seed(0))
        expected, protein = network.decode(z, batch, Draws())
        found, same = narrow.decode(z, few, Draws())
    share = expected.log_scale.exp()[:, GENES].double()
    torch.testing.assert_close(found.log_scale.exp().double(), share / share.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.log_theta, expected.log_theta[..., GENES])
    if expected.zero_logits is not None:
        torch.testing.assert_close(found.zero_logits, expected.zero_logits[:, GENES])
    for one, other in zip(protein or (), same or (), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model", MODELS)
def test_widening_and_narrowing_may_come_in_any_order(model):
    config = make_config(model, dispersion="gene-batch", gene_likelihood="zinb")
    network = make_network(config, dtype=torch.float32)
    one, _ = surgery.widen(surgery.narrow(network, GENES), replace(wider(config), n_genes=3))
    other = surgery.narrow(surgery.widen(network, wider(config))[0], GENES)
    assert one.config == other.config
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_the_given_network_is_left_alone():
    network = make_network(make_config("totalanvi"), dtype=torch.float32)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    wide, tables = surgery.widen(surgery.narrow(network, torch.arange(5)), wider(network.config))
    with torch.no_grad():
        for parameter in surgery.hold(wide, tables).parameters():
            parameter.add_(1.0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


# training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("plain", "one batch", "per batch")], ids=str)
def test_only_new_rows_have_gradients_and_they_are_the_right_ones(model, options):
    config = config_of(model, options)
    wide, tables = surgery.widen(make_network(config, dtype=torch.float32), wider(config))
    batch = make_batch(wide.config, n_cells=12, n_labelled=3 if config.has_labels else 0, dtype=torch.float32)
    noise = make_noise(wide.config, batch)

    def gradients(network):
        network.zero_grad()
        negative_elbo(network.terms(batch, None, draws_of(noise, batch))).sum().backward()

    gradients(wide)
    expected = {name: wide.get_parameter(name).grad[new].clone() for name, new in tables}
    wide.zero_grad()
    held = surgery.hold(wide, tables).train()
    trained = {name for name, parameter in held.named_parameters() if parameter.requires_grad}
    path = {name: "{}.parametrizations.{}.original".format(*name.rsplit(".", 1)) for name, _ in tables}
    assert trained == set(path.values())
    gradients(held)
    some = 0
    for name, gradient in expected.items():
        found = held.get_parameter(path[name]).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        some += bool(gradient.abs().max() > 0)
    assert some >= 2  # encoder and decoder


@pytest.fixture(scope="module")
def query():
    """A network of each model for a reference of two batches, widened by the third; and the cells of that one."""
    mdata = cite(300, n_proteins=12, rna_only_batch=False)
    mdata.obs["donor"] = np.where(np.arange(300) % 2, "a", "b")
    found = {}
    for name in MODELS:
        labels = {"labels_key": "cell_type"} if name.endswith("anvi") else {}
        where = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], **labels}
        setup = find_setup(mdata, proteins="total" in name, **where)
        options = {"n_hidden": 16, "dispersion": "gene-batch"}
        config = starting.make_config(name, setup, options)
        small = replace(config, n_batches=2, n_panels=2 if config.has_protein else 1)
        reference = VAE(small, loop.generator(0)).eval()
        wide, tables = surgery.widen(reference, config)
        third = mdata[(mdata.obs["batch"] == "batch_2").to_numpy()].copy()
        found[name] = reference, wide, tables, read_cells(third, setup, labels=bool(labels))
    return found


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_reference_knows_does_not_move(query, monkeypatch, name, weight_decay):
    reference, wide, tables, cells = query[name]
    seen = []

    def fit(network, *args, **options):
        history = loop.fit(network, *args, **options)
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        seen.append(network)
        return history

    monkeypatch.setattr(surgery, "fit", fit)
    plan = Plan(max_epochs=3, weight_decay=weight_decay, adversary=False).for_cells(90, warm_start=True)
    train, validation = split(cells, 0.9, loop.generator(0))
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    network, history = surgery.train_new_rows(wide, tables, cells, train, validation, plan, 0)
    assert len(history) == 3
    new = {table.name: table.new for table in tables}
    for key, value in network.state_dict().items():
        assert torch.equal(wide.state_dict()[key], before[key])  # the given network is left alone
        moved = (value != before[key]).reshape(len(value), -1).any(1) if value.dim() else value != before[key]
        assert torch.equal(moved, new.get(key, torch.zeros_like(moved))), key
    # in the network that was trained, too: norms, their statistics and all rows of the reference
    held, state = seen[1], seen[0]
    for key, value in before.items():
        owner, _, last = key.rpartition(".")
        if key in new:
            kept = held.get_submodule(owner).parametrizations[last][0].kept
            assert torch.equal(kept, value[~new[key]]), key
        else:
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", ["scvi", "totalanvi"])
def test_training_lowers_the_loss_of_the_query(query, name):
    _, wide, tables, cells = query[name]
    train, validation = split(cells, 0.9, loop.generator(0))
    plan = Plan(max_epochs=25, adversary=False).for_cells(len(train), warm_start=True)
    _, history = surgery.train_new_rows(wide, tables, cells, train, validation, plan, 0)
    assert history["validation_loss"].iloc[-1] < history["validation_loss"].iloc[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_held_network_in_training_mode_neither_drops_nor_looks_at_the_minibatch(query, name):
    _, wide, tables, _ = query[name]
    config = wide.config
    held = surgery.hold(surgery.narrow(wide, torch.arange(config.n_genes)), tables).train()
    batch = make_batch(config, n_cells=7, dtype=torch.float32)
    with torch.no_grad():
        expected = wide.eval().terms(batch, None, FixedDraws())
        found = held.terms(batch, None, Draws())  # zeros, too; an error if anything is to be dropped
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert not any(norm.training for norm in held.modules() if isinstance(norm, surgery.BatchNorm))
