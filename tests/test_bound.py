"""metrics.elbo, marginal_likelihood and reconstruction_error against loops, scipy and exact integration."""

import copy

import mudata
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from anndata import AnnData
from helpers import assert_same, cite, contents, mudata_of, permuted
from networks import Naive, make_network
from scipy import sparse, stats
from scipy.special import logsumexp

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._data.setup import find_setup
from anvi._model import Model
from anvi._posterior import bound, encode
from anvi.nn import Config, Draws

# six cells of two batches; the second batch lacks the second protein, the last cell is not in the protein modality
RNA = np.array([[3, 0, 1, 5], [0, 2, 2, 0], [1, 1, 0, 9], [4, 0, 0, 0], [2, 7, 1, 3], [1, 0, 2, 2]])
PROTEINS = np.array([[20, 3], [5, 40], [60, 0], [9, np.nan], [30, np.nan]])
BATCH = np.array(list("aaabbb"))
LABEL = np.array(["A", "B", "Unknown", "B", "Unknown", "A"])
SIZES = {"n_hidden": 4, "gene_likelihood": "nb", "n_batches": 2}


def tiny_data(copies: int = 1):
    """The six cells, each several times."""
    names = [f"{i}-{j:04d}" for i in range(6) for j in range(copies)]
    rna = AnnData(sparse.csr_matrix(np.repeat(RNA, copies, 0), dtype=np.float32), obs=pd.DataFrame(index=names))
    of_protein = names[: 5 * copies]
    prot = AnnData(np.repeat(PROTEINS, copies, 0).astype(np.float32), obs=pd.DataFrame(index=of_protein))
    prot.var_names = ["p0", "p1"]
    mdata = mudata_of({"rna": rna, "prot": prot})
    mdata.obs["batch"] = pd.Categorical(np.repeat(BATCH, copies))
    mdata.obs["cell_type"] = pd.Categorical(np.repeat(LABEL, copies))
    return mdata


def tiny_model(name: str, mdata, n_latent: int = 1, seed: int = 0, **options) -> Model:
    """A model of one latent dimension with random weights."""
    labels_key = "cell_type" if "anvi" in name else None
    setup = find_setup(mdata, proteins="total" in name, labels_key=labels_key, batch_key="batch")
    sizes = SIZES | {"n_genes": 4, "n_latent": n_latent, "n_labels": len(setup.classes)}
    sizes |= {"n_proteins": 2, "n_panels": 2} if "total" in name else {}
    network = make_network(Config(**sizes | options).checked(), seed=seed, dtype=torch.float32)
    _widen(network)
    return Model(name, setup, network, pd.DataFrame(), {})


@torch.no_grad()
def _widen(network) -> None:
    """Let the approximate posteriors cover the exact ones, so that some thousand draws find all of them."""
    encoders = [(network.encoder, 0.0, 1.5), (network.library_encoder, 3.0, 1.5)]
    encoders += [] if network.labels is None else [(network.labels.encode_u, 0.0, 1.5)]
    heads = [pair for part, mean, var in encoders if part for pair in ((part.mean, mean), (part.log_var, np.log(var)))]
    heads += [] if network.protein is None else [(network.protein.back_mean, 3.0), (network.protein.back_scale, 1.0)]
    for head, bias in heads:
        for name, parameter in head.named_parameters():
            parameter.mul_(0.2) if name != "bias" else parameter.fill_(bias)


VARIANTS = {
    "scvi": {},
    "scvi latent library": {"library": "latent", "gene_likelihood": "zinb"},
    "scvi ln": {"latent_distribution": "ln", "n_latent": 2},
    "scanvi": {"label_prior": "learned"},
    "totalvi": {},
    "totalanvi": {},
    "totalanvi latent library": {"library": "latent"},
    "totalanvi scvi-tools": {"objective": "scvi-tools", "efficiency": True},
}
# the elbo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_labels", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bound_is_that_of_loops_cell_by_cell(variant, use_labels):
    name, options = variant.split()[0], VARIANTS[variant]
    mdata = tiny_data()
    model = tiny_model(name, mdata, **options)
    found = av.metrics.elbo(mdata, model=model, use_labels=use_labels, per_cell=True, random_state=3)
    assert list(found.index) == list(mdata.obs_names)
    cells = read_cells(mdata, model.setup, labels=use_labels)
    batch = _double(take(cells, torch.arange(6)))
    noise = bound.draw_noise(model.config, 3, 0, torch.arange(6))._asdict()
    network = copy.deepcopy(model.network).double()
    for n in range(6):
        parts = Naive(network).bound(batch, {key: value for key, value in noise.items() if value is not None}, n)
        # the incumbent's objective never looks at the label
        label = None if options.get("objective") or "anvi" not in name else int(batch.label[n])
        expected = reference.cell_bound(**parts, label=label)
        row = found.iloc[n]
        if "penalty" in row:
            expected -= row["penalty"]
        # float32 sums of some tens of terms of up to 100 nats against float64
        assert row["elbo"] == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert row["reconstruction_rna"] == pytest.approx(-parts["log_px"], rel=1e-5, abs=1e-4)
        assert row["elbo"] == pytest.approx(-row.drop("elbo").sum(), rel=1e-6)
        for term in ("kl_library", "kl_background"):
            assert row.get(term, 0.0) == pytest.approx(parts.get(term, 0.0), rel=1e-4, abs=1e-4)
    means = av.metrics.elbo(mdata, model=model, use_labels=use_labels, random_state=3)
    assert means == pytest.approx(found.mean().to_dict())


def test_each_model_has_its_terms_and_a_labelled_cell_pays_for_its_class(fitted):
    rna, joint = {"elbo", "reconstruction_rna", "kl_z"}, {"reconstruction_protein", "kl_background"}
    labels = {"kl_u", "kl_label"}
    expected = {"scvi": rna, "scanvi": rna | labels, "totalvi": rna | joint, "totalanvi": rna | joint | labels}
    for name, terms in expected.items():
        assert set(av.metrics.elbo(fitted, model=name)) == terms
    table = av.metrics.elbo(fitted, model="totalanvi", per_cell=True)
    known = (fitted.obs["cell_type"] != "Unknown").to_numpy()
    np.testing.assert_allclose(table["kl_label"][known], np.log(6), rtol=1e-5)  # six classes, uniform
    assert (table["kl_label"][~known] < np.log(6)).all()


def test_a_cell_without_rna_has_no_library_to_draw():
    """Its latent library size is that of the prior, whatever the library's encoder makes of no counts."""
    whole = tiny_data()
    mdata = mudata_of({"rna": whole["rna"][1:].copy(), "prot": whole["prot"].copy()})
    mdata.obs = mdata.obs.join(whole.obs[["batch", "cell_type"]])
    model = tiny_model("totalvi", mdata, library="latent")
    ask = {"model": model, "per_cell": True, "n_samples": 20}
    before = av.metrics.marginal_likelihood(mdata, **ask)["log_likelihood"]
    with torch.no_grad():
        model.network.library_encoder.mean.bias.add_(1.0)
    after = av.metrics.marginal_likelihood(mdata, **ask)["log_likelihood"]
    alone = ~mdata.obs_names.isin(mdata["rna"].obs_names)
    assert alone.sum() == 1
    assert list(after[alone]) == list(before[alone])
    assert (after[~alone] != before[~alone]).all()


def test_more_draws_are_the_mean_of_single_ones():
    mdata = tiny_data()
    model = tiny_model("totalanvi", mdata)
    cells = read_cells(mdata, model.setup)
    found = bound.bound(model, cells, torch.arange(6), 3, seed=1)
    single = []
    for sample in range(3):
        noise = bound.draw_noise(model.config, 1, sample, torch.arange(6))
        given = bound._GivenNoise(noise.z, noise.back, noise.u.flatten(0, 1))
        with torch.no_grad():
            terms = model.network.terms(take(cells, torch.arange(6)), None, given)
        single.append(terms.reconstruction_protein.numpy())
    np.testing.assert_allclose(found.reconstruction_protein, np.mean(single, 0), rtol=1e-5)


@pytest.mark.parametrize("metric", ["elbo", "reconstruction_error", "marginal_likelihood"])
def test_no_number_depends_on_chunks_on_company_or_on_order(fitted, metric, monkeypatch):
    ask = lambda data, **options: getattr(av.metrics, metric)(
        data, **{"model": "totalanvi", "n_samples": 2, "per_cell": True} | options
    )
    whole = ask(fitted)
    validation = ask(fitted, split="validation")
    chosen = fitted.obs["totalanvi_split"] == "validation"
    assert list(validation.index) == list(fitted.obs_names[chosen])
    # float32 products of another size may round otherwise in the last digits, of sums of some hundred nats
    close = {"rtol": 1e-4, "atol": 2e-3}
    pd.testing.assert_frame_equal(validation, whole[chosen.to_numpy()], **close)
    shuffled = mudata_of({name: permuted(mod, 1) for name, mod in fitted.mod.items()}, like=fitted)
    shuffled.uns = fitted.uns
    pd.testing.assert_frame_equal(ask(shuffled).loc[whole.index], whole, **close)
    monkeypatch.setattr(encode, "CHUNK", 7)
    pd.testing.assert_frame_equal(ask(fitted), whole, **close)
    means = ask(fitted, per_cell=False)
    assert means == pytest.approx(whole.mean().to_dict(), rel=1e-5)
    assert not np.allclose(ask(fitted, random_state=1).iloc[:, 0], whole.iloc[:, 0])


def test_the_noise_is_one_draw_per_cell_and_number():
    config = Config(n_genes=4, n_proteins=2, n_labels=3, n_latent=5, library="latent")
    whole = bound.draw_noise(config, 0, 0, torch.arange(600))
    assert [part.shape[1:] for part in whole] == [(5,), (1,), (2,), (15,)]
    some = torch.tensor([599, 3, 300])
    for ours, all_of_them in zip(bound.draw_noise(config, 0, 0, some), whole, strict=True):
        torch.testing.assert_close(ours, all_of_them[some], rtol=0, atol=0)
    everything = torch.cat([part.flatten(1) for part in whole], 1)
    other = bound.draw_noise(config, 0, 1, torch.arange(600)).z
    assert len(everything.unique()) > 0.999 * everything.numel() and not torch.equal(other, whole.z)
    # 600 x 23 standard normals: mean 0 and sd 1, each within 4 of their standard errors
    assert abs(float(everything.mean())) < 4 / 117 and abs(float(everything.std()) - 1) < 4 / 166


# the reconstruction -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reconstruction_is_the_likelihood_alone():
    mdata = tiny_data()
    model = tiny_model("totalanvi", mdata)
    found = av.metrics.reconstruction_error(mdata, model=model, per_cell=True)
    assert list(found) == ["rna", "protein"]
    cells = read_cells(mdata, model.setup)
    noise = bound.draw_noise(model.config, 0, 0, torch.arange(6))
    network, batch = copy.deepcopy(model.network).double(), _double(take(cells, torch.arange(6)))
    q = network.encode(batch, Draws())
    rna, protein = network.decode(q.mean + q.var.sqrt() * noise.z, batch, bound._GivenNoise(noise.back.double()))
    log_px = _nb(RNA, (batch.log_library + rna.log_scale).exp().numpy(), rna.log_theta.exp().numpy()).sum(1)
    np.testing.assert_allclose(found["rna"], -log_px, rtol=1e-5)
    log_py = _mixture(np.nan_to_num(np.vstack([PROTEINS, [0, 0]])), protein)
    measured = np.vstack([~np.isnan(PROTEINS), [False, False]])
    np.testing.assert_allclose(found["protein"][:5], -(log_py * measured).sum(1)[:5], rtol=1e-5)
    assert np.isnan(found["protein"].iloc[5])
    means = av.metrics.reconstruction_error(mdata, model=model)
    assert means["protein"] == pytest.approx(found["protein"][:5].mean())
    bound_of_them = av.metrics.elbo(mdata, model=model, use_labels=False)
    assert bound_of_them["reconstruction_protein"] == pytest.approx(found["protein"].sum() / 6)
    assert bound_of_them["reconstruction_rna"] == pytest.approx(means["rna"])


def test_protein_error_of_data_without_proteins_is_missing(fitted):
    rna_only = mudata_of({"rna": fitted["rna"]}, like=fitted)
    found = av.metrics.reconstruction_error(rna_only, model=av.get.model(fitted, "totalvi"))
    assert np.isnan(found["protein"]) and found["rna"] > 0


# the marginal likelihood ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "use_labels"),
    [*((variant, False) for variant in VARIANTS if variant != "scvi ln"), ("scanvi", True), ("totalanvi", True)],
)
def test_the_marginal_likelihood_is_that_of_exact_integration(variant, use_labels):
    name, options = variant.split()[0], VARIANTS[variant]
    copies, n_samples = 500, 40
    mdata = tiny_data(copies)
    model = tiny_model(name, mdata, **options)
    found = av.metrics.marginal_likelihood(
        mdata, model=model, n_samples=n_samples, use_labels=use_labels, per_cell=True, random_state=5
    )
    cells = read_cells(mdata, model.setup, labels=use_labels)
    first = _double(take(cells, torch.arange(0, 6 * copies, copies)))
    exact = np.array([_integrated(copy.deepcopy(model.network).double(), first, n) for n in range(6)])
    # every copy of a cell estimates the same likelihood without bias, from noise of its own
    ratio = np.exp(found["log_likelihood"].to_numpy().reshape(6, copies) - exact[:, None])
    error = ratio.std(1) / np.sqrt(copies)
    assert error.max() < 0.08
    assert (np.abs(ratio.mean(1) - 1) < 4 * error + 1e-3).all(), (ratio.mean(1), error)
    assert found["effective_samples"].between(1 - 1e-6, n_samples + 1e-6).all()


@pytest.mark.parametrize("n_samples", [1, 5, 8])
def test_draws_are_counted_exactly(n_samples):
    copies = 4_000
    mdata = tiny_data(copies)
    model = tiny_model("scvi", mdata)
    found = av.metrics.marginal_likelihood(mdata, model=model, n_samples=n_samples, per_cell=True)
    first = _double(take(read_cells(mdata, model.setup), torch.arange(0, 6 * copies, copies)))
    exact = np.array([_integrated(copy.deepcopy(model.network).double(), first, n) for n in range(6)])
    ratio = np.exp(found["log_likelihood"].to_numpy().reshape(6, copies) - exact[:, None])
    error = ratio.std(1) / np.sqrt(copies)
    assert error.max() < 0.05
    assert (np.abs(ratio.mean(1) - 1) < 4 * error + 1e-3).all()


@pytest.mark.parametrize("use_labels", [False, True])
def test_the_bound_is_below_what_it_bounds(fitted, use_labels):
    for name in ("scvi", "scanvi", "totalvi", "totalanvi"):
        options = {"model": name, "n_samples": 25, "use_labels": use_labels, "per_cell": True}
        gap = (
            av.metrics.marginal_likelihood(fitted, **options)["log_likelihood"]
            - av.metrics.elbo(fitted, **options)["elbo"]
        )
        # both are estimates, of the same 25 draws: a cell may have bad luck, their mean may not
        assert gap.mean() > 1 and (gap > 0).mean() > 0.9, name


def test_more_draws_raise_the_estimate_and_what_they_are_worth(fitted):
    few, many = (
        av.metrics.marginal_likelihood(fitted, model="totalanvi", split="validation", n_samples=n) for n in (2, 60)
    )
    assert many["log_likelihood"] > few["log_likelihood"] + 1
    assert 1 <= few["effective_samples"] <= 2 < many["effective_samples"] + 1


def _double(batch):
    return batch._replace(
        **{k: v.double() for k, v in batch._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    )


def _nb(x, mean, theta):
    return stats.nbinom.logpmf(x, theta, theta / (theta + mean))


def _mixture(y, rates, log_back=None, efficiency=0.0):
    """Log-probability of proteins at given log background, by scipy."""
    log_back = rates.log_back.numpy() if log_back is None else log_back
    factor = np.exp((rates.log_fore - rates.log_back).numpy())
    phi, background = rates.log_phi.exp().numpy(), 1 / (1 + np.exp(-rates.mixing.numpy()))
    rate = np.exp(log_back + efficiency)
    parts = np.stack([np.log(background) + _nb(y, rate, phi), np.log1p(-background) + _nb(y, rate * factor, phi)])
    return logsumexp(parts, axis=0)


def _log_integral(log_values, step, axis):
    """Of a smooth function that vanishes at both ends of its grid, where the rectangle rule is exact to many digits."""
    return logsumexp(log_values, axis=axis) + np.log(step)


@torch.no_grad()
def _integrated(network, batch, n: int) -> float:
    """Exact log-likelihood of one cell: z, u, library size and each background integrated on grids."""
    config = network.config
    z, dz = np.linspace(-14, 14, 351, retstep=True)
    here = torch.full((len(z),), n)
    many = type(batch)(
        **{
            key: value[here] if torch.is_tensor(value) else None
            for key, value in batch._asdict().items()
            if key != "n_labelled"
        }
    )
    rna, protein = network.decode(torch.tensor(z)[:, None], many, Draws())
    log_p = _log_prior(network, z, int(batch.label[n]))
    theta, x = rna.log_theta.exp().numpy(), batch.x[n].numpy()
    zero = 0 if rna.zero_logits is None else 1 / (1 + np.exp(-rna.zero_logits.numpy()))

    def log_px(log_library):
        kept = np.log1p(-zero) + _nb(x, np.exp(log_library + rna.log_scale.numpy()), theta)
        with np.errstate(divide="ignore"):
            extra = np.where(x == 0, np.log(zero), -np.inf)
        return np.logaddexp(kept, extra).sum(-1)

    if config.library == "latent":
        code = int(batch.batch[n])
        mean, sd = float(network.library_mean[code]), float(network.library_var[code]) ** 0.5
        grid, step = np.linspace(mean - 9 * sd, mean + 9 * sd, 101, retstep=True)
        of_grid = [log_px(value) + stats.norm.logpdf(value, mean, sd) for value in grid]
        log_p = log_p + _log_integral(np.array(of_grid), step, 0)
    else:
        log_p = log_p + log_px(float(batch.log_library[n]))
    if protein is not None:
        part, panel = network.protein, int(batch.panel[n])
        efficiency = 0.0 if part.log_efficiency is None else part.log_efficiency[int(batch.batch[n])].numpy()
        for t in np.flatnonzero(batch.measured[n].numpy()):
            mean, sd = float(part.prior_mean[panel, t]), float(part.prior_log_scale[panel, t].exp())
            grid, step = np.linspace(mean - 9 * sd, mean + 9 * sd, 101, retstep=True)
            of_grid = [
                _mixture(batch.y[n].numpy(), protein, np.full((len(z), 2), value), efficiency)[:, t]
                + stats.norm.logpdf(value, mean, sd)
                for value in grid
            ]
            log_p = log_p + _log_integral(np.array(of_grid), step, 0)
    return float(_log_integral(log_p, dz, 0))


def _log_prior(network, z, label: int):
    """Log p(z), or log p(z, label) of a labelled cell, u integrated for each class."""
    if network.labels is None:
        return stats.norm.logpdf(z)
    u, du = np.linspace(-9, 9, 451, retstep=True)
    log_classes = network.labels.log_prior.log_softmax(-1).numpy()
    by_class = []
    for c in range(network.config.n_labels):
        p = network.labels.decode_u(torch.tensor(u)[:, None], torch.full((len(u), 1), c), Draws())
        mean, sd = p.mean.numpy().ravel(), p.var.sqrt().numpy().ravel()
        of_u = stats.norm.logpdf(z[:, None], mean, sd) + stats.norm.logpdf(u)
        by_class.append(log_classes[c] + _log_integral(of_u, du, 1))
    return by_class[label] if label >= 0 else logsumexp(by_class, axis=0)


# errors and what is left alone ------------------------------------------------------------------------------------


def test_errors_name_the_slot(fitted):
    new = cite(80)
    model = av.get.model(fitted, "totalanvi")
    with pytest.raises(KeyError, match=r"obs\['totalanvi_split'\]"):
        av.metrics.elbo(new, model=model, split="validation")
    with pytest.raises(ValueError, match="there are: 'train', 'validation'|there are: 'validation', 'train'"):
        av.metrics.elbo(fitted, model="totalanvi", split="test")
    for metric in (av.metrics.elbo, av.metrics.marginal_likelihood, av.metrics.reconstruction_error):
        with pytest.raises(ValueError, match="n_samples=0"):
            metric(fitted, model="scvi", n_samples=0)
        with pytest.raises(ValueError, match="n_samples=2.5 must be a whole number"):
            metric(fitted, model="scvi", n_samples=2.5)
    del new.obs["cell_type"]
    with pytest.raises(KeyError, match="labels of the fit, 'cell_type', are not in this object; use_labels=False"):
        av.metrics.elbo(new, model=model)
    assert set(av.metrics.elbo(new, model=model, use_labels=False)) == set(av.metrics.elbo(fitted, model="totalanvi"))
    assert av.metrics.marginal_likelihood(new, model=model, n_samples=2)["log_likelihood"] < 0


def test_rna_models_find_their_split_in_the_modality_and_nothing_is_written(fitted):
    before = contents(fitted)
    n = (fitted["rna"].obs["scvi_split"] == "validation").sum()
    assert len(av.metrics.elbo(fitted, model="scvi", split="validation", per_cell=True)) == n
    rna = fitted["rna"].copy()
    rna.obs["batch"] = fitted.obs["batch"]
    assert len(av.metrics.elbo(rna, model="scvi", split="validation", per_cell=True)) == n
    av.metrics.marginal_likelihood(fitted, model="scvi", n_samples=1)
    assert_same(contents(fitted), before)


def test_cells_outside_the_model_are_left_out(fitted, tmp_path):
    rna = fitted["rna"][20:].copy()
    mdata = mudata_of({"rna": rna, "prot": fitted["prot"]}, like=fitted)
    mdata.write(tmp_path / "x.h5mu")
    mdata = mudata.read(tmp_path / "x.h5mu")
    found = av.metrics.elbo(mdata, model=av.get.model(fitted, "totalanvi"), per_cell=True)
    assert sorted(found.index) == sorted(rna.obs_names)
