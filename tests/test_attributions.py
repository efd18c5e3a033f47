"""Integrated gradients against captum, against planted truth, and what becomes of them in slots."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from captum.attr import IntegratedGradients
from checkpoints import CHECKPOINTS, data_of
from helpers import cite, mudata_of, permuted, quiet_mudata
from networks import make_batch, make_config, make_network
from sklearn.metrics import roc_auc_score

import anvi as av
from anvi._data.batches import take
from anvi._data.cells import read_cells
from anvi._posterior import attribute
from anvi._posterior import integrate as lines
from anvi._posterior.attribute import Profiles, Zero
from anvi._posterior.integrate import Baseline, integrate, midpoints
from anvi.nn import VAE, Batch, Draws

# against captum ---------------------------------------------------------------------------------------------------

NETWORKS = {
    "scanvi": ("scanvi", {}),
    "scanvi, counts as they are": ("scanvi", {"log_variational": False}),
    "scanvi, no covariates in the encoder": ("scanvi", {"encode_covariates": False}),
    "scanvi, covariates in the first layer": ("scanvi", {"deeply_inject_covariates": False, "n_layers_encoder": 2}),
    "scanvi, layer norm": ("scanvi", {"use_layer_norm": "both", "use_batch_norm": "none"}),
    "scanvi, two layers, linear classifier": ("scanvi", {"n_layers_encoder": 2, "linear_classifier": True}),
    "scanvi, no norm": ("scanvi", {"use_batch_norm": "none"}),
    "totalanvi": ("totalanvi", {}),
    "totalanvi, no norm in the encoder": ("totalanvi", {"use_batch_norm": "decoder", "n_layers_encoder": 2}),
    "totalanvi, layer norm, two layers": ("totalanvi", {"use_layer_norm": "both", "n_layers_encoder": 2}),
    "totalanvi, as scvi-tools": ("totalanvi", {"objective": "scvi-tools"}),
}


def some_baseline(batch, seed: int = 0) -> Baseline:
    """Counts as another cell might have them, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch.x.shape, generator=generator, dtype=batch.x.dtype) * 4
    x[:, ::2] = 0
    if batch.y is None:
        return Baseline(x, None)
    y = torch.rand(batch.y.shape, generator=generator, dtype=batch.x.dtype) * 30
    return Baseline(x, torch.where(batch.measured, y, 0.0))


def definition(
    network: VAE, batch: Batch, baseline: Baseline, target: torch.Tensor, n_steps: int, method: str
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What `integrate` computes, by captum: attributions of genes and proteins, and what they should sum to."""
    n = len(batch.x)

    def value(*counts: torch.Tensor) -> torch.Tensor:
        copies = len(counts[0]) // n  # captum lays the points of all cells one after the other
        parts = {
            name: torch.cat([part] * copies) for name, part in batch._asdict().items() if isinstance(part, torch.Tensor)
        }
        seen = batch._replace(**parts | dict(zip(("x", "y"), counts, strict=False)))
        return (network.logits(seen, Draws()) * torch.cat([target] * copies)).sum(1)

    ends = (batch.x,) if batch.y is None else (batch.x, batch.y)
    starts = tuple(torch.zeros_like(end) if b is None else b for end, b in zip(ends, baseline, strict=False))
    found = IntegratedGradients(value).attribute(ends, starts, n_steps=n_steps, method=method)
    return found, (value(*ends) - value(*starts)).detach()


def rule_of(method: str, n_steps: int):
    if method == "riemann_middle":
        return midpoints(n_steps)
    places, weights = np.polynomial.legendre.leggauss(n_steps)
    return (places + 1) / 2, weights / 2


@pytest.mark.parametrize("start", ["zero", "counts"])
@pytest.mark.parametrize("method", ["riemann_middle", "gausslegendre"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_of_captum(name, method, start):
    kind, options = NETWORKS[name]
    config = make_config(kind, **options)
    network, batch = make_network(config), make_batch(config, n_cells=7)
    baseline = Baseline(None, None) if start == "zero" else some_baseline(batch)
    target = torch.eye(config.n_labels, dtype=torch.float64)[torch.arange(7) % config.n_labels]
    target[0, 1] = -1  # a contrast
    ours = integrate(network, batch, baseline, target, rule_of(method, 11))
    theirs, _ = definition(network, batch, baseline, target, 11, method)
    largest = theirs[0].abs().max()
    # captum multiplies its steps in float32: relative 1e-7 of sums of a few numbers
    for one, other in zip(ours, theirs, strict=False):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-6 * float(largest))
    assert (ours[1] is None) == (kind == "scanvi")


@pytest.mark.parametrize("n_genes", [5, 40])
def test_leaving_out_genes_changes_nothing(n_genes):
    """Few genes that move are packed cell by cell; with many, all are looked at. Both are the same numbers."""
    config = make_config("totalanvi", n_genes=n_genes)
    network, batch = make_network(config), make_batch(config, n_cells=6)
    target = torch.eye(3, dtype=torch.float64)[torch.zeros(6, dtype=torch.long)]
    wide = batch.x.clone()
    wide[:, :] = wide + 1.0
    for x in (batch.x * (torch.rand(batch.x.shape) < 0.3), wide):
        x[:, 0] = 2.0
        one = batch._replace(x=x)
        ours = integrate(network, one, Baseline(None, None), target, midpoints(9))[0]
        theirs = definition(network, one, Baseline(None, None), target, 9, "riemann_middle")[0][0]
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-7)
        assert (ours[x == 0] == 0).all()


def test_denser_points_at_zero_lead_to_the_same_integral():
    config = make_config("totalanvi", n_genes=30)
    network, batch = make_network(config), make_batch(config, n_cells=6)
    target = torch.eye(3, dtype=torch.float64)[torch.ones(6, dtype=torch.long)]
    ours = integrate(network, batch, Baseline(None, None), target, midpoints(2000, attribute.FROM_ZERO))
    theirs, difference = definition(network, batch, Baseline(None, None), target, 4000, "riemann_middle")
    # both are within about 1e-3 of the integral: the integrand jumps where a ReLU opens
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=2e-3 * float(difference.abs().max()))
    assert midpoints(7, 4)[1].sum() == pytest.approx(1, abs=0.03)


def test_passes_change_nothing(monkeypatch):
    config = make_config("totalanvi", n_genes=30)
    network, batch = make_network(config), make_batch(config, n_cells=9)
    target = torch.eye(3, dtype=torch.float64)[torch.arange(9) % 3]
    whole = integrate(network, batch, some_baseline(batch), target, midpoints(8))
    monkeypatch.setitem(lines.ROWS, "cpu", 17)
    parts = integrate(network, batch, some_baseline(batch), target, midpoints(8))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["scanvi", "totalanvi"])
def test_models_of_scvi_tools(name):
    data, model = data_of(name), av.io.from_scvi_tools(CHECKPOINTS / name)
    found = av.tl.attributions(data, model=model, baseline="zero", n_cells=5, n_steps=40, per_cell=True, inplace=False)
    cells = read_cells(data, model.setup)
    index = torch.from_numpy(pd.Index(cells.names).get_indexer(found["obs"].values.astype(str)))
    batch = take(cells, index)
    target = torch.nn.functional.one_hot(predicted_codes(model, cells)[index], len(model.classes)).float()
    theirs, difference = definition(model.network, batch, Baseline(None, None), target, 2000, "gausslegendre")
    mods = [model.setup.rna_mod] + ([model.setup.prot_mod] if model.setup.joint else [])
    for mod, other in zip(mods, theirs, strict=True):
        ours = found[f"{mod}_per_cell"].values
        known = np.isfinite(ours)
        # two ways to approximate the integral, each good to 1 % of what a cell's attributions sum to
        scale = 0.02 * difference.abs().numpy()[:, None] + 1e-4
        assert (np.abs(ours - other.detach().numpy()) < scale)[known].all()
        assert mod == mods[0] or not known.all()  # the checkpoint has cells without proteins


# cells, one at a time ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model that knows its classes, on 600 cells; never written to."""
    mdata = cite(600, random_state=3)
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=30, early_stopping=False, protein_weight=1.0)
    return mdata


@pytest.fixture
def mdata(trained):
    return trained.copy()


@torch.no_grad()
def predicted_codes(model, cells):
    """Code of the class that each cell is predicted to be, all cells at once."""
    q_z = model.network.eval().encode(take(cells, torch.arange(len(cells))), Draws())
    return model.network.labels.classify(q_z.mean, Draws()).argmax(1)


def parts_of(mdata, key="totalanvi"):
    model = av.get.model(mdata, key)
    return model, read_cells(mdata, model.setup)


@pytest.mark.parametrize("baseline", ["each", "rest", "zero", "NK", 3])
def test_attributions_sum_to_the_difference_of_logits(mdata, baseline):
    found = av.tl.attributions(mdata, baseline=baseline, n_cells=40, inplace=False)
    share = float((found["complete"] * found["n_cells"]).sum() / found["n_cells"].sum())
    if baseline != "NK":  # of which the NK cells themselves differ by next to nothing
        assert share >= 0.99
    total = found["rna"].sum("rna_var") + found["prot"].sum("prot_var")
    measured_by_all = (found["prot_cells"] == found["n_cells"]).all("prot_var")
    wrong = np.abs(total - found["difference"])[measured_by_all] > found["delta"][measured_by_all] + 1e-4
    assert not wrong.any()


def test_the_difference_is_that_of_the_network(mdata):
    """Sums of single cells against logits at the cell and at a baseline made by hand."""
    found = av.tl.attributions(mdata, baseline="rest", n_cells=20, per_cell=True, inplace=False, n_steps=200)
    model, cells = parts_of(mdata)
    code = predicted_codes(model, cells).numpy()
    x, y = cells.x.dense(cells.x_row)[0].numpy(), np.where(cells.measured, cells.y, np.nan)
    share = np.stack([x[code == c].mean(0) / x[code == c].mean(0).sum() for c in range(6)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        protein = np.stack([np.nanmean(y[code == c], 0) for c in range(6)])
    protein /= protein.sum(1, keepdims=True)
    names = list(cells.names)
    for name in found["obs"].values[::11]:
        i = names.index(name)
        others = [c for c in range(6) if c != code[i]]
        start_x = share[others].mean(0) * x[i].sum()
        known = cells.measured[i].numpy()
        start_y = np.where(known, protein[others].mean(0), 0)
        start_y = start_y * (y[i][known].sum() / max(start_y.sum(), 1e-30))
        batch = take(cells, torch.tensor([i]))
        start = batch._replace(x=torch.tensor(start_x)[None].float(), y=torch.tensor(start_y)[None].float())
        with torch.no_grad():
            logits = [model.network.logits(one, Draws())[0, code[i]].item() for one in (batch, start)]
        total = float(found["rna_per_cell"].sel(obs=name).sum()) + float(found["prot_per_cell"].sel(obs=name).sum())
        assert total == pytest.approx(logits[0] - logits[1], rel=0.01)


def test_unmeasured_proteins_have_no_number(mdata):
    found = av.tl.attributions(mdata, n_cells=None, per_cell=True, inplace=False, n_steps=4)
    model, cells = parts_of(mdata)
    known = pd.DataFrame(cells.measured.numpy(), cells.names, list(model.setup.proteins))
    known = known.loc[found["obs"].values, found["prot_var"].values].to_numpy()
    assert 0.1 < known.mean() < 0.9
    np.testing.assert_array_equal(np.isfinite(found["prot_per_cell"].values), known)
    code = pd.Series(predicted_codes(model, cells).numpy(), cells.names)[found["obs"].values].to_numpy()
    for c in range(6):
        np.testing.assert_array_equal(found["prot_cells"][c], known[code == c].sum(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mean = np.nanmean(found["prot_per_cell"].values[code == c], axis=0)
        np.testing.assert_allclose(found["prot"][c], mean, rtol=1e-4, atol=1e-6)
        single = found["rna_per_cell"].values[code == c]
        np.testing.assert_allclose(found["rna"][c], single.mean(0), rtol=1e-4, atol=1e-6)
        error = single.std(0, ddof=1) / np.sqrt(len(single))
        np.testing.assert_allclose(found["rna_error"][c], error, rtol=1e-3, atol=1e-6)


def test_a_group_without_proteins(mdata):
    found = av.tl.attributions(mdata, groupby="batch", n_cells=10, n_steps=4, inplace=False)
    last = found.sel({"class": "batch_2"})  # the batch with RNA only
    assert last["prot"].isnull().all() and (last["prot_cells"] == 0).all()
    assert last["rna"].notnull().all() and last["complete"] > 0
    assert found.sel({"class": "batch_0"})["prot"].notnull().all()


def test_presence_and_absence(mdata):
    """What a gene brings where its count is above the baseline, less what it costs where it is below."""
    found = av.tl.attributions(mdata, baseline="rest", n_cells=30, per_cell=True, inplace=False)
    model, cells = parts_of(mdata)
    names = pd.Index(cells.names).get_indexer(found["obs"].values)
    code = predicted_codes(model, cells).numpy()
    x = cells.x.dense(cells.x_row)[0].numpy()
    share = np.stack([x[code == c].mean(0) / x[code == c].mean(0).sum() for c in range(6)])
    rest = np.stack([np.delete(share, c, 0).mean(0) for c in range(6)])
    above = x[names] > rest[code[names]] * x[names].sum(1, keepdims=True)
    single = found["rna_per_cell"].values
    for c in range(6):
        of_class = code[names] == c
        gain = np.where(above, single, 0)[of_class].mean(0)
        lack = np.where(above, 0, single)[of_class].mean(0)
        wanted = gain + np.minimum(lack, 0)
        np.testing.assert_allclose(found["rna_presence"][c], wanted, rtol=1e-3, atol=1e-5)
    zero = av.tl.attributions(mdata, baseline="zero", n_cells=5, inplace=False)
    np.testing.assert_array_equal(zero["rna_presence"], zero["rna"])


def test_a_contrast_is_the_difference_of_two_targets(mdata):
    options = {"baseline": "NK", "groups": ["B"], "n_cells": 10, "n_steps": 400, "inplace": False}
    one, other, both = (
        av.tl.attributions(mdata, target=target, **options) for target in ("B", "CD4 T", ("B", "CD4 T"))
    )
    # within the error of 400 points, which need not be doubled for the same cells
    np.testing.assert_allclose(both["rna"][0], one["rna"][0] - other["rna"][0], atol=0.02)
    np.testing.assert_allclose(both["difference"][0], one["difference"][0] - other["difference"][0], rtol=1e-4)
    assert both["rna"][1:].isnull().all()
    by_default = av.tl.attributions(mdata, target=("B", "CD4 T"), n_cells=10, inplace=False)
    assert by_default["n_cells"].values.tolist() == [10, 0, 10, 0, 0, 0]  # of the classes B, CD14 Mono, CD4 T, ...
    difference = by_default["difference"].values  # from the mean of the CD4 T cells, which they are themselves
    assert difference[0] > 1 and difference[0] > 2 * abs(difference[2])
    assert by_default.attrs["against"] == "CD4 T"


def test_a_class_on_request(mdata):
    found = av.tl.attributions(mdata, target="NK", baseline="zero", n_cells=10, inplace=False)
    assert found["difference"].sel({"class": "NK"}) == found["difference"].max()


# reproducible, bounded --------------------------------------------------------------------------------------------


def test_nothing_depends_on_blocks_or_on_the_order_of_cells(mdata, monkeypatch):
    whole = av.tl.attributions(mdata, n_cells=20, inplace=False)
    shuffled = mudata_of({name: permuted(mdata[name], 5) for name in ("rna", "prot")}, mdata)
    shuffled.uns["totalanvi"] = mdata.uns["totalanvi"]
    largest = []

    def taken(cells, index, *args, **kwargs):
        largest.append(len(index))
        return take(cells, index, *args, **kwargs)

    monkeypatch.setattr(attribute, "BLOCK", 13)
    monkeypatch.setattr(attribute, "BLOCK", 13)
    monkeypatch.setattr(attribute, "take", taken)
    monkeypatch.setattr(attribute, "take", taken)
    with quiet_mudata():
        parts = av.tl.attributions(shuffled, n_cells=20, inplace=False)
    assert max(largest) == 13
    for name in ("rna", "rna_presence", "prot", "difference"):
        # float32 sums in another order; and a cell at the edge of the tolerance may get twice the points
        np.testing.assert_allclose(parts[name], whole[name], rtol=2e-3, atol=2e-3)


def test_the_same_seed_gives_the_same_numbers(mdata):
    global_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = av.tl.attributions(mdata, n_cells=5, baseline=3, n_steps=4, inplace=False)
    again = av.tl.attributions(mdata, n_cells=5, baseline=3, n_steps=4, inplace=False)
    other = av.tl.attributions(mdata, n_cells=5, baseline=3, n_steps=4, inplace=False, random_state=1)
    assert first.equals(again) and not first.equals(other)
    assert (np.random.get_state()[1] == global_state[0]).all() and torch.equal(torch.get_rng_state(), global_state[1])


def test_a_balanced_sample():
    group = torch.tensor([0] * 50 + [1] * 3 + [-1] * 10 + [2] * 7)
    lot = torch.rand(200, len(group), generator=torch.Generator().manual_seed(0))
    index = attribute.sample(group, 5, lot[0])
    assert torch.bincount(group[index]).tolist() == [5, 3, 5]
    assert len(index.unique()) == 13 and torch.equal(index, index.sort().values)
    assert len(attribute.sample(group, None, lot[0])) == 60
    first = {int(attribute.sample(group, 1, numbers)[0]) for numbers in lot}
    assert len(first) > 40  # of 50; random, not the first ones


def test_more_points_only_where_they_are_needed(mdata, monkeypatch):
    used = []

    def counted(network, batch, baseline, target, rule, *more):
        used.append((len(rule[0]), len(batch.x)))
        return integrate(network, batch, baseline, target, rule, *more)

    monkeypatch.setattr(attribute, "integrate", counted)
    av.tl.attributions(mdata, baseline="rest", n_cells=20, n_steps=3, inplace=False)
    steps = [steps for steps, _ in used]
    assert steps == [3, 6, 12, 24, 48, 96][: len(steps)] and len(steps) > 2
    cells = [n for _, n in used]
    assert cells == sorted(cells, reverse=True) and cells[-1] < cells[0]


# baselines --------------------------------------------------------------------------------------------------------


def test_profiles_are_brought_to_the_depth_of_the_cell(mdata):
    model, cells = parts_of(mdata)
    code = predicted_codes(model, cells)
    means = attribute.Means(cells, 6)
    for rows in torch.arange(600).split(100):
        means.add(take(cells, rows), code[rows])
    rna, protein = means.profiles()
    index = torch.arange(0, 600, 7)
    batch = take(cells, index)
    row = code[index, None]
    (start,) = Profiles(rna, protein, row)(batch, torch.arange(len(index)))
    torch.testing.assert_close(start.x.sum(1), batch.x.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(start.y.sum(1), (batch.y * batch.measured).sum(1), rtol=1e-4, atol=1e-3)
    assert (start.y[~batch.measured] == 0).all()
    (plain,) = Profiles(*means.profiles(False), row, False)(batch, torch.arange(len(index)))
    x = cells.x.dense(cells.x_row)[0]
    torch.testing.assert_close(plain.x[0], x[code == code[0]].mean(0), rtol=1e-4, atol=1e-5)


def test_a_protein_that_no_baseline_knows_starts_at_the_cells_own_count():
    batch = SimpleNamespace(
        x=torch.ones(1, 2), y=torch.tensor([[6.0, 4.0, 9.0]]), measured=torch.tensor([[True, True, False]])
    )
    start = attribute.start_at(batch, torch.ones(1, 2), torch.tensor([[float("nan"), 1.0, 1.0]]), True)
    assert start.y.tolist() == [[6.0, 4.0, 0.0]]


def test_means_of_groups_count_the_same():
    nan = float("nan")
    profiles = torch.tensor([[1.0, 2.0], [3.0, nan], [nan, nan]])
    chosen = torch.tensor([[True, True, True], [False, True, True]])
    found = attribute.mean_over(profiles, chosen)
    np.testing.assert_array_equal(found, [[2.0, 2.0], [3.0, nan]])


def test_references_are_from_the_other_classes_in_turn():
    group = torch.tensor([0] * 40 + [1] * 40 + [2] * 4 + [3] * 2)
    chosen = torch.tensor([[False, True, True, False], [True, False, True, False]])
    stained = torch.arange(86) % 2 == 0
    lot = torch.rand(86, generator=torch.Generator().manual_seed(0))
    drawn = attribute.draw_references(group, chosen, 6, lot, torch.Generator().manual_seed(0), stained)
    for row, others in enumerate(([1, 2], [0, 2])):
        assert torch.bincount(group[drawn[row]], minlength=4)[others].tolist() == [3, 3]
    assert (drawn % 2 == 0).all()  # stained ones, where there are any
    few = attribute.draw_references(group, chosen[:1] & (torch.arange(4) == 2), 9, lot, torch.Generator())
    assert torch.bincount(few[0], minlength=86)[80:84].min() >= 2  # all four cells, before any a third time


@pytest.mark.parametrize("word", ["each", "rest", "zero"])
def test_a_word_is_no_group_of_that_name(mdata, word):
    names = np.array(["some", "others"])[np.arange(mdata.n_obs) % 2]
    options = {"groupby": "group", "baseline": word, "n_cells": 10, "n_steps": 5, "inplace": False}
    mdata.obs["group"] = pd.Categorical(names, ["some", "others"])
    expected = av.tl.attributions(mdata, **options)
    mdata.obs["group"] = pd.Categorical(np.where(names == "some", word, names), [word, "others"])
    np.testing.assert_array_equal(av.tl.attributions(mdata, **options)["rna"], expected["rna"])


def test_cells_that_may_be_chosen_are_kept_within_a_bound(monkeypatch):
    """Few enough are all kept; of too many, with those that others took the place of, none."""
    number = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    group = torch.arange(20_000) % 4
    kept = attribute._Lowest(4, 50, 4, 20_000)
    seen = torch.cat([kept.add(group[rows], number[rows]) for rows in torch.arange(20_000).split(256)])
    assert seen[attribute.sample(group, 50, number)].all()
    bound = 200 * (1 + np.log(20_000 / 200))
    assert 200 < seen.sum() < 1.3 * bound
    monkeypatch.setattr(attribute, "MOST_HELD", int(bound) - 1)
    assert not attribute._Lowest(4, 50, 4, 20_000).add(group, number).any()
    assert attribute._Lowest(4, 50, 1, 20_000).add(group, number).any()  # one of the groups is asked for


def test_groups_without_cells_are_told_before_anything_is_predicted(mdata, monkeypatch):
    mdata.obs["group"] = pd.Categorical(["some"] * mdata.n_obs, ["some", "never"])
    monkeypatch.setattr(attribute, "survey", None)
    with pytest.raises(ValueError, match="No cell is in any of the groups 'never'"):
        av.tl.attributions(mdata, groupby="group", groups=["never"], inplace=False)
    with pytest.raises(ValueError, match="baseline: there is no cell in the group 'never'"):
        av.tl.attributions(mdata, groupby="group", baseline="never", inplace=False)


def test_references_are_not_the_cells_that_are_explained(mdata, monkeypatch):
    """A cell that is its own reference explains nothing."""
    drawn, original = [], attribute.draw_references
    monkeypatch.setattr(attribute, "draw_references", lambda *args: drawn.append(original(*args)) or drawn[0])
    found = av.tl.attributions(
        mdata, target=("B", "NK"), baseline=10, n_cells=15, n_steps=2, per_cell=True, inplace=False
    )
    _, cells = parts_of(mdata)
    assert not set(cells.names[drawn[0].unique()]) & set(found["obs"].values)


def test_a_zero_baseline_holds_nothing():
    assert list(Zero()(None, None)) == [Baseline(None, None)]


# planted truth ----------------------------------------------------------------------------------------------------


def planted(seed: int, shuffled: bool):
    """Cells with known markers and a gene that carries nothing but depth, fitted; with true or with shuffled labels."""
    mdata = av.datasets.synthetic_cite(1200, n_genes=300, random_state=seed)
    rng = np.random.default_rng(seed)
    rna = mdata["rna"]
    depth = np.asarray(rna.X.sum(1)).ravel()
    wider = AnnData(
        np.column_stack([rna.X.toarray(), rng.poisson(0.02 * depth)]).astype(np.float32),
        obs=pd.DataFrame(index=rna.obs_names),
        var=pd.DataFrame(index=[*rna.var_names, "DEPTH"]),
    )
    both = mudata_of({"rna": wider, "prot": mdata["prot"].copy()}, mdata)
    if shuffled:
        known = (both.obs["cell_type"] != "Unknown").to_numpy()
        labels = both.obs["cell_type"].astype(object).to_numpy(copy=True)
        labels[known] = rng.permutation(labels[known])
        both.obs["cell_type"] = pd.Categorical(labels)
    with av.settings.override(verbosity=0), quiet_mudata():
        av.tl.totalanvi(both, batch_key="batch", max_epochs=15 if shuffled else 40)
    truth = {"rna": rna.varm["true_markers"], "prot": mdata["prot"].varm["true_markers"]}
    return both, truth, rna.var_names[rna.var["batch_gene"]]


def auroc(found, truth: dict[str, pd.DataFrame], what: str = "_presence") -> pd.DataFrame:
    """How well attributions tell the markers of each class from the other features, per modality."""
    out = {}
    for mod, markers in truth.items():
        scores = found[f"{mod}{what}"].to_pandas().T.reindex(markers.index)
        out[mod] = {name: roc_auc_score(markers[name], scores[name].fillna(0)) for name in markers}
    return pd.DataFrame(out)


@pytest.mark.slow
def test_planted_markers_are_found_and_depth_and_batch_are_not():
    both, truth, batch_genes = planted(0, shuffled=False)
    found = av.tl.attributions(both, inplace=False)
    assert float((found["complete"] * found["n_cells"]).sum() / found["n_cells"].sum()) >= 0.99
    area = auroc(found, truth)
    assert (area >= 0.95).all(axis=None), area  # of each class, in each modality
    ranks = found["rna_presence"].to_pandas().T.rank(pct=True)
    # the ranks of a gene of no meaning lie anywhere between 0 and 1: .25 from the middle on average, of six classes by
    # chance up to .25 + 2 * .144 / sqrt(6); one that always speaks for or against a class lies at the ends
    assert (ranks.loc["DEPTH"] - 0.5).abs().mean() < 0.37
    assert ranks.loc[batch_genes].mean().mean() < 0.55
    assert (ranks.loc[batch_genes] > 0.95).mean(axis=None) < 0.025  # half of what chance would put among the markers
    zero = av.tl.attributions(both, baseline="zero", inplace=False)["rna_presence"].to_pandas().T.rank(pct=True)
    assert (zero.loc["DEPTH"] - 0.5).abs().mean() > 0.37  # what the other baselines are for


@pytest.mark.slow
def test_shuffled_labels_find_no_markers():
    both, truth, _ = planted(0, shuffled=True)
    # what is called B is by chance, so each class is asked for in all cells; six classes of 300 genes scatter by .03
    found = av.tl.attributions(both, groupby="batch", target="B", n_cells=100, inplace=False)
    scores = found["rna_presence"].mean("class").to_pandas().reindex(truth["rna"].index)
    area = [roc_auc_score(truth["rna"][name], scores) for name in truth["rna"]]
    assert abs(np.mean(area) - 0.5) < 0.15
