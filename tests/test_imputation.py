"""Imputation of unmeasured proteins: against loops and libraries, where it happens, intervals, files, mapping."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from helpers import cite
from mudata import MuData, read_h5mu
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

import anvi as av
from anvi._data.cells import read_cells
from anvi._data.containers import Source
from anvi._data.select import find_features
from anvi._model import Imputation, Model
from anvi._posterior import encode, expected, imputation

HIDDEN = "batch_1"


def partly_stained(seed: int = 0) -> tuple[MuData, pd.DataFrame]:
    """Two batches with all proteins measured in the first and none in the second, and the counts of all."""
    whole = cite(500, n_genes=80, n_batches=2, n_panels=1, rna_only_batch=False, random_state=seed)
    truth = whole["prot"].to_df()
    seen = whole.obs_names[(whole.obs["batch"] != HIDDEN).to_numpy()]
    mdata = MuData({"rna": whole["rna"].copy(), "prot": whole["prot"][whole["prot"].obs_names.isin(seen)].copy()})
    for column in ("batch", "cell_type"):
        mdata.obs[column] = whole.obs[column].reindex(mdata.obs_names)
    return mdata, truth


@pytest.fixture(scope="module")
def _half():
    with av.settings.override(progress=False, device="cpu", verbosity=0, n_threads=1):
        mdata, truth = partly_stained()
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=8)
    return mdata, truth


@pytest.fixture
def half(_half):
    return _half[0].copy(), _half[1]


def impute(model: Model, cells) -> np.ndarray:
    """Imputed counts of all cells `(cells, proteins)`."""
    imputing = imputation.Imputing.of(model, cells, torch.arange(len(cells)))
    for block in encode.blocks(model, cells):
        imputing.add(block)
    return imputing.found.value


def components_by_hand(mdata, part: Imputation) -> pd.DataFrame:
    """Log-normalised genes, standardised within batches as numpy does, times the loadings."""
    x = np.asarray(mdata["rna"].X.todense(), dtype=np.float64)
    x = np.log1p(x / x.sum(1, keepdims=True) * 1e4)[:, part.genes.numpy()]
    batch = mdata.obs["batch"].to_numpy()
    everywhere_mean, everywhere_square = x.mean(0), (x**2).mean(0)
    out = np.zeros_like(x)
    for name in np.unique(batch):
        rows, n = batch == name, (batch == name).sum()
        mean = (x[rows].sum(0) + 10 * everywhere_mean) / (n + 10)
        square = ((x[rows] ** 2).sum(0) + 10 * everywhere_square) / (n + 10)
        out[rows] = (x[rows] - mean) / (np.sqrt(np.clip(square - mean**2, 1e-12, None)) + 1e-6)
    return pd.DataFrame(np.clip(out, -10, 10) @ part.loading.numpy(), mdata["rna"].obs_names)


def test_against_numpy_and_scikit_learn(half):
    """Neighbours by scikit-learn, the regression by its Ridge; float32 here, float64 there."""
    mdata, _ = half
    model = av.get.model(mdata)
    part = model.imputation
    components = components_by_hand(mdata, part)
    bare = MuData({"rna": mdata["rna"].copy()})  # the encoder without any proteins
    bare.obs = mdata.obs[["batch", "cell_type"]]
    latent = pd.DataFrame(av.tl.latent(bare, model=model, inplace=False), bare.obs_names)
    stained = mdata["prot"].to_df()
    split = mdata.obs["totalanvi_split"]
    landmarks = [name for name in np.sort(stained.index) if split[name] == "train"]
    y = np.log1p(stained.loc[landmarks].to_numpy())

    def joint(names):
        parts = []
        for table in (latent, components):
            own = table.loc[landmarks].to_numpy()
            parts.append((table.loc[names].to_numpy() - own.mean(0)) / np.sqrt(own.var(0, ddof=1).sum()))
        return np.hstack(parts)

    asked = mdata.obs_names[(mdata.obs["batch"] == HIDDEN).to_numpy()]
    near = NearestNeighbors(n_neighbors=30).fit(joint(landmarks)).kneighbors(joint(asked), return_distance=False)
    c = components.loc[landmarks].to_numpy()
    unit = ((c - c.mean(0)) ** 2).sum(1).mean()
    line = np.zeros((len(asked), y.shape[1]))
    for j in range(y.shape[1]):
        errors = {}
        for penalty in (0.1, 0.3, 1.0, 3.0):  # leaving out one after the other, with the mean of the others
            hat = (c - c.mean(0)) @ np.linalg.inv(
                (c - c.mean(0)).T @ (c - c.mean(0)) + penalty * unit * np.eye(c.shape[1])
            ) @ (c - c.mean(0)).T + 1 / len(c)
            errors[penalty] = np.mean(((y[:, j] - hat @ y[:, j]) / (1 - np.diag(hat))) ** 2)
        best = Ridge(alpha=min(errors, key=errors.get) * unit).fit(c, y[:, j])
        line[:, j] = best.predict(components.loc[asked].to_numpy())
    by_hand = np.expm1(np.clip(2 / 3 * y[near].mean(1) + line / 3, 0, None))
    found = av.tl.denoise(mdata, modality="prot", include_background=True, inplace=False)["prot"].to_pandas()
    np.testing.assert_allclose(found.loc[asked, stained.columns], by_hand, rtol=2e-3, atol=2e-3)


def test_only_what_was_not_measured_is_imputed(half):
    mdata, _ = half
    model = av.get.model(mdata)
    decoder = replace(model, imputation=None)
    hidden = (mdata.obs["batch"] == HIDDEN).to_numpy()
    for background in (True, False):
        options = {"modality": "prot", "include_background": background, "inplace": False}
        with_it, without = (av.tl.denoise(mdata, model=m, **options)["prot"].to_numpy() for m in (model, decoder))
        np.testing.assert_array_equal(with_it[~hidden], without[~hidden])
        assert (np.abs(with_it[hidden] - without[hidden]) > 1e-3).mean() > 0.9
    whole = av.tl.denoise(mdata, modality="prot", include_background=True, inplace=False)["prot"].to_numpy()
    assert (with_it[hidden] <= whole[hidden] + 1e-5).all() and (with_it >= 0).all()
    # what is averaged or moved is the decoder's
    for options in ({"transform_batch": "all"}, {"n_samples": 2}):
        one, other = (
            av.tl.denoise(mdata, modality="prot", model=m, inplace=False, **options) for m in (model, decoder)
        )
        np.testing.assert_array_equal(one["prot"], other["prot"])


def test_a_cell_is_imputed_alike_whoever_is_asked_with_it(half):
    mdata, _ = half
    options = {"modality": "prot", "include_background": True, "inplace": False, "return_interval": 0.8}
    whole = av.tl.denoise(mdata, **options)
    few = mdata.obs_names[(mdata.obs["batch"] == HIDDEN).to_numpy()][:7]
    bare = MuData({"rna": mdata["rna"][few].copy()})
    bare.obs["batch"] = mdata.obs["batch"].loc[few]
    alone = av.tl.denoise(bare, model=av.get.model(mdata), **options)
    for name in ("prot", "prot_lower", "prot_upper"):
        np.testing.assert_allclose(alone[name], whole[name].sel(obs=few), rtol=1e-4, atol=1e-4)


def test_slots_and_their_file(half, tmp_path):
    mdata, _ = half
    av.tl.denoise(mdata, include_background=True, return_interval=0.9)
    lower, value, upper = (av.get.table(mdata, f"totalanvi_prot_{name}") for name in ("lower", "denoised", "upper"))
    hidden = (mdata.obs["batch"] == HIDDEN).to_numpy()
    assert lower[~hidden].isna().all(axis=None) and not lower[hidden].isna().any(axis=None)
    assert (lower[hidden] <= upper[hidden]).all(axis=None) and (value[hidden] <= upper[hidden]).mean().mean() > 0.95
    told = mdata.uns["totalanvi"]["denoise"]["prot"]
    np.testing.assert_allclose(told["imputed"], hidden.mean())
    assert told["return_interval"] == 0.9
    mdata.write(tmp_path / "x.h5mu")
    pd.testing.assert_frame_equal(av.get.table(read_h5mu(tmp_path / "x.h5mu"), "totalanvi_prot_lower"), lower)
    av.tl.denoise(mdata)
    assert "totalanvi_prot_lower" not in mdata.obsm and "totalanvi_prot_upper" not in mdata.obsm


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
def test_intervals_hold_what_they_say(coverage):
    """Hidden cells of the same kind as the held-out ones, no training beyond a few epochs: within .03, all proteins."""
    whole = cite(2_400, n_genes=60, n_batches=1, n_panels=1, rna_only_batch=False)
    truth = whole["prot"].to_df()
    unseen = np.sort(np.random.default_rng(0).permutation(whole.n_obs)[:800])
    kept = truth.drop(whole.obs_names[unseen]).index
    mdata = MuData({"rna": whole["rna"].copy(), "prot": whole["prot"][kept].copy()})
    mdata.obs["cell_type"] = whole.obs["cell_type"].reindex(mdata.obs_names)
    av.tl.totalanvi(mdata, max_epochs=3)
    found = av.tl.denoise(mdata, modality="prot", include_background=True, inplace=False, return_interval=coverage)
    names = whole.obs_names[unseen]
    lower, upper = (found[f"prot_{end}"].to_pandas().loc[names, truth.columns] for end in ("lower", "upper"))
    counts = truth.loc[names]
    # counts are whole numbers: an end may fall on one, and then holds all cells that have it
    inside = ((counts >= lower.round(3)) & (counts <= upper.round(3))).mean().mean()
    assert coverage - 0.03 < inside < coverage + 0.05


def test_bad_intervals(half):
    mdata, _ = half
    with pytest.raises(TypeError, match="return_interval='0.9' must be a number"):
        av.tl.denoise(mdata, return_interval="0.9")
    for wrong in (0, 1, -0.5):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            av.tl.denoise(mdata, return_interval=wrong)
    for options in ({"transform_batch": HIDDEN}, {"n_samples": 3}, {"return_mean": False}, {"features": ["P01"]}):
        with pytest.raises(ValueError, match="ends for imputed values alone"):
            av.tl.denoise(mdata, return_interval=0.9, **options)
    stained = mdata[(mdata.obs["batch"] != HIDDEN).to_numpy()].copy()
    with pytest.raises(ValueError, match="none is imputed here"):
        av.tl.denoise(stained, return_interval=0.9)


def test_models_without_it_decode(half):
    """As those of schema 2."""
    mdata, _ = half
    model = av.get.model(mdata)
    weights = {name: value for name, value in model.weights().items() if not name.startswith("imputation.")}
    earlier = Model.from_parts(model.facts() | {"schema": 2}, weights, model.history)
    assert earlier.imputation is None
    found = av.tl.denoise(mdata, model=earlier, modality="prot", inplace=False)["prot"]
    np.testing.assert_array_equal(
        found, av.tl.denoise(mdata, model=replace(model, imputation=None), modality="prot", inplace=False)["prot"]
    )


def test_minified_data_impute_the_same(half):
    mdata, _ = half
    small = av.tl.minify(mdata, copy=True)
    for background in (True, False):
        options = {"modality": "prot", "include_background": background, "inplace": False, "return_interval": 0.9}
        before, after = av.tl.denoise(mdata, **options), av.tl.denoise(small, **options)
        for name in ("prot", "prot_lower", "prot_upper"):
            np.testing.assert_array_equal(after[name], before[name])


def test_stored_and_read(half, tmp_path):
    mdata, _ = half
    model = av.get.model(mdata)
    av.io.write_model(mdata, tmp_path / "m")
    again = av.io.read_model(tmp_path / "m")
    for name, value in model.imputation._asdict().items():
        stored = getattr(again.imputation, name)
        same = stored is None if value is None else torch.equal(stored.nan_to_num(-1), value.nan_to_num(-1))
        assert same, name
    assert again.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "genes": lambda t: t + 1_000,
        "batch": lambda t: t - 1,
        "latent": lambda t: t[:, :-1],
        "y": lambda t: t[:-1],
        "slope": lambda t: t * torch.nan,
        "measured": lambda t: t.float(),
        "residuals": lambda t: t[:, :50],
        "loading": lambda t: t.flatten(),
    }.items(),
)
def test_a_damaged_one_is_refused(half, name, change):
    model = av.get.model(half[0])
    weights = model.weights()
    weights[f"imputation.{name}"] = change(weights[f"imputation.{name}"]).contiguous()
    with pytest.raises(ValueError, match="damaged"):
        Model.from_parts(model.facts(), weights, model.history)
    del weights[f"imputation.{name}"]
    with pytest.raises(ValueError, match="damaged"):
        Model.from_parts(model.facts(), weights, model.history)


def test_a_query_of_fewer_genes_is_imputed(half):
    """Mapped onto a reference of stained cells alone; genes in another order and a fifth of them missing."""
    mdata, truth = half
    hidden = (mdata.obs["batch"] == HIDDEN).to_numpy()
    reference = mdata[~hidden].copy()
    for slot in list(reference.obs):
        if slot.startswith("totalanvi"):
            del reference.obs[slot]
    reference.uns.clear(), reference.obsm.clear()
    av.tl.totalanvi(reference, batch_key="batch", max_epochs=8)
    some = np.random.default_rng(0).permutation(80)[:64]
    query = MuData({"rna": mdata["rna"][hidden][:, some].copy()})
    query.obs["batch"] = "new"
    av.tl.map_query(query, reference, max_epochs=3)
    part, before = av.get.model(query).imputation, av.get.model(reference).imputation
    assert part.center.shape == (len(av.get.model(query).setup.batches), 64) and not part.measured[-1].any()
    torch.testing.assert_close(part.latent, before.latent)
    genes = np.array(av.get.model(query).setup.genes)
    assert set(genes[part.genes.numpy()]) == set(query["rna"].var_names)
    av.tl.denoise(query, include_background=True)
    found = av.get.table(query, "totalanvi_prot_denoised")
    # a protein that no type has is background, which nothing foretells
    told = mdata["prot"].var_names[np.asarray(mdata["prot"].varm["true_markers"]).any(axis=1)]

    def correlation(cells) -> float:
        pairs = [np.log1p([found[name], truth.loc[cells, name]]) for name in told]
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))

    right, wrong = correlation(query.obs_names), correlation(query.obs_names[::-1])
    assert len(told) > 5 and right > 0.4 > 0.15 > abs(wrong), (len(told), right, wrong)


def test_whose_proteins_are_imputed(half):
    """A batch without proteins, cells without any, proteins that a batch never measured; nothing that was measured."""
    mdata, truth = half
    model = av.get.model(mdata)
    assert model.imputation.measured.tolist() == [[name != HIDDEN] * 20 for name in model.setup.batches]
    counts = truth.reindex(mdata.obs_names)
    hidden = mdata.obs_names[(mdata.obs["batch"] == HIDDEN).to_numpy()]
    stained = mdata["prot"].obs_names
    counts.loc[hidden, counts.columns[5:]] = np.nan  # five proteins of the batch that the fit saw without any
    counts.loc[stained[0], "P03"] = np.nan
    counts = counts.drop(index=stained[-1])
    other = MuData({"rna": mdata["rna"].copy(), "prot": AnnData(counts.astype(np.float32))})
    other.obs["batch"] = mdata.obs["batch"].reindex(other.obs_names)
    cells = read_cells(Source(other), replace(model.setup, measured=((True,) * 20,) * len(model.setup.panels)))
    where = pd.DataFrame(imputation._to_impute(model.imputation, cells).numpy(), cells.names, model.setup.proteins)
    assert not where.loc[stained[:-1]].any(axis=None) and where.loc[stained[-1]].all()
    assert (where.loc[hidden].to_numpy() == counts.loc[hidden, list(model.setup.proteins)].isna().to_numpy()).all()

    # cells with other proteins: half of the logarithm is decoded
    found = pd.DataFrame(impute(model, cells), cells.names).loc[hidden].iloc[:, 5:]
    blind = replace(cells, mask_table=torch.zeros_like(cells.mask_table[:1]), mask_row=torch.zeros_like(cells.mask_row))
    alone = pd.DataFrame(impute(model, blind), cells.names).loc[hidden].iloc[:, 5:]
    decoded = expected.expected_expression(
        model, cells, find_features(model.setup, None, "prot"), include_background=True
    )
    decoded = pd.DataFrame(decoded.prot, cells.names).loc[hidden].iloc[:, 5:]
    np.testing.assert_allclose(np.log1p(found), (np.log1p(alone) + np.log1p(decoded)) / 2, rtol=1e-3, atol=1e-3)


def test_a_mapped_batch_measures_what_the_reference_or_the_query_did(half):
    mdata, _ = half
    model = av.get.model(mdata)
    cells = read_cells(Source(mdata), model.setup)
    blind = replace(cells, mask_table=torch.zeros_like(cells.mask_table[:1]), mask_row=torch.zeros_like(cells.mask_row))
    whole = model.imputation.measured
    less = whole.clone()
    less[0, 3] = False  # which cells of the query have
    before = model.imputation._replace(measured=less)
    for some, expected_rows in ((blind, less), (cells, whole)):
        after = imputation.widened(before, np.arange(80), some, 3)
        assert after.measured[:2].equal(expected_rows) and not after.measured[2].any()
        assert after.center[:2].equal(before.center) and after.center.shape == (3, 80)


def test_nothing_is_kept_where_it_would_not_be_used():
    mdata = cite(300, n_genes=60)
    av.tl.scanvi(mdata, batch_key="batch", max_epochs=1)
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1, objective="scvi-tools")
    assert av.get.model(mdata, "scanvi").imputation is None and av.get.model(mdata, "totalvi").imputation is None


def test_landmarks_are_bounded(monkeypatch):
    monkeypatch.setattr(imputation, "LANDMARKS", 60)
    monkeypatch.setattr(encode, "CHUNK", 64)
    mdata, _ = partly_stained()
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    part = av.get.model(mdata).imputation
    assert len(part.y) == len(part.latent) == len(part.components) == len(part.batch) == 60


def several_kits(n_batches: int, n_hidden: int = 1, spread: float = 1.0, seed: int = 0) -> tuple[MuData, pd.DataFrame]:
    """Batches that count the same proteins on scales of their own, the last ones unstained, and the counts of all."""
    whole = cite(250 * n_batches, n_genes=80, n_batches=n_batches, n_panels=1, rna_only_batch=False, random_state=seed)
    batch, rng = whole.obs["batch"].to_numpy().astype(str), np.random.default_rng(seed)
    scale = pd.DataFrame(np.exp(spread * rng.standard_normal((n_batches, 20)) + 2), np.unique(batch))
    truth = pd.DataFrame(np.round(whole["prot"].X * scale.loc[batch].to_numpy()), whole.obs_names)
    truth.columns = whole["prot"].var_names
    stained = ~np.isin(batch, np.unique(batch)[-n_hidden:])
    mdata = MuData({"rna": whole["rna"].copy(), "prot": AnnData(truth[stained].astype(np.float32))})
    for column in ("batch", "cell_type"):
        mdata.obs[column] = whole.obs[column].reindex(mdata.obs_names)
    return mdata, truth


def landmarks_of(offset: np.ndarray, noise: float = 0.1, n: int = 300) -> Imputation:
    """Landmarks of batches, whose log counts are a line of their place, and an offset `(batches, proteins)` on it."""
    generator, (n_batches, n_proteins) = torch.Generator().manual_seed(0), offset.shape
    place = torch.randn(n * n_batches, 3, generator=generator)
    batch = torch.arange(n_batches).repeat_interleave(n)
    line = place @ torch.randn(3, n_proteins, generator=generator)
    y = 3 + line + noise * torch.randn(line.shape, generator=generator) + torch.tensor(offset).float()[batch]
    empty = dict.fromkeys(Imputation._fields[:-3], torch.zeros(0))
    measured = torch.ones(n_batches, n_proteins, dtype=torch.bool)
    return Imputation(**empty | {"y": y, "latent": place, "components": place, "batch": batch, "measured": measured})


def test_offsets_of_batches_are_found():
    """Against the offsets that the counts were made with, two of them not measured; the variance by numpy."""
    offset = np.random.default_rng(1).normal(size=(4, 30))
    part = landmarks_of(offset)
    part.y[part.batch == 2, :10] = torch.nan
    part.y[part.batch != 1, 10:15] = torch.nan  # one batch alone
    offset[2, :10] = offset[[0, 2, 3], 10:15] = np.nan
    found = imputation._aligned(part)
    centred = offset - np.nanmean(offset, axis=0)
    there = ~np.isnan(offset)
    np.testing.assert_allclose(found.offset.numpy()[there], centred[there], atol=0.12)
    # Smyth 2004: a prior of four degrees of freedom at the mean of all proteins; one batch alone has but the prior
    several, n = np.delete(np.arange(30), slice(10, 15)), (~np.isnan(offset)).sum(0)
    own = np.nanvar(centred[:, several], axis=0, ddof=1) * (1 + 1 / n[several])
    moderated = ((n[several] - 1) * own + 4 * own.mean()) / (n[several] + 3)
    np.testing.assert_allclose(found.between.numpy()[several], np.sqrt(moderated), rtol=0.1)
    np.testing.assert_allclose(found.between.numpy()[10:15], np.sqrt(own.mean()), rtol=0.1)


def test_batches_that_are_alike_lend_their_offsets():
    """Two pairs of kits; of one kit five proteins are not measured, and its like says where they would be."""
    offset = np.repeat(np.random.default_rng(1).normal(size=(2, 20)) * 1.5, 2, axis=0)
    truth = offset + 0.05 * np.random.default_rng(2).normal(size=offset.shape)
    part = landmarks_of(truth)
    part.y[part.batch == 3, :5] = torch.nan
    part.measured[3, :5] = False
    found = imputation._aligned(part)
    whole = imputation._aligned(landmarks_of(truth))
    apart = (found.offset[3] - found.offset[2]).abs()
    assert apart[:5].max() < 0.15 and (found.offset[3] - found.offset[0])[:5].abs().max() > 0.5
    assert 0 < found.apart[3, :5].min() and found.apart[3].max() < 0.4 and not found.apart[3, 5:].any()
    torch.testing.assert_close(found.offset[:, 5:], whole.offset[:, 5:], atol=0.05, rtol=0)
    # a kit like no other is as far off as any
    part = landmarks_of(np.random.default_rng(3).normal(size=(4, 20)))
    part.y[part.batch == 3, :5] = torch.nan
    alone = imputation._aligned(part)
    assert alone.apart[3, :5].min() > 0.5 and alone.apart.max() <= 1 and not alone.apart[:3].any()


def test_a_kit_that_counts_more_of_all_does_so_of_what_it_lacks():
    """Two kits, one deeper by 2 in every logarithm, each with proteins of its own."""
    rng = np.random.default_rng(0)
    truth = np.array([[0.0], [2.0]]) + 0.2 * rng.normal(size=(2, 24))
    part = landmarks_of(truth)
    for batch, columns in ((0, slice(0, 4)), (1, slice(4, 8))):
        part.y[part.batch == batch, columns] = torch.nan
        part.measured[batch, columns] = False
    found = imputation._aligned(part)
    deeper = found.offset[1] - found.offset[0]
    np.testing.assert_allclose(deeper.numpy(), (truth[1] - truth[0]), atol=1.2)
    assert (deeper[:8] - 2).abs().max() < 0.3  # each where it was not measured, from the other sixteen
    sd = np.std(truth[1, 8:] - truth[0, 8:], ddof=1)
    missing = (found.apart * found.between)[[0] * 4 + [1] * 4, [*range(4), *range(4, 8)]].numpy()
    np.testing.assert_allclose(missing, np.minimum(sd * np.sqrt(1 + 1 / 16), found.between[:8].numpy()), rtol=0.25)


def test_ends_of_an_interval_by_hand():
    """One protein: measured in the cell's batch, nowhere near it, known from like batches, and half decoded."""
    grid = torch.linspace(-1, 3, 101)[None]  # residuals; their median is 1
    part = landmarks_of(np.zeros((3, 1)))._replace(
        residuals=grid,
        between=torch.tensor([2.0]),
        apart=torch.tensor([[0.0], [1.0], [0.25]]),
        measured=torch.tensor([[True], [False], [False]]),
    )
    batch, share = torch.tensor([0, 1, 2, 1]), torch.tensor([1.0, 1.0, 1.0, 0.5])[:, None]
    found, spread = torch.full((4, 1), 9.0), torch.full((4, 1), 0.5)
    lower, upper = imputation._interval(part, batch, found, spread, share, 0.9)
    sd, t_6 = np.array([0, 2, 0.5, 1]), 1.9431803  # six degrees of freedom: four of the prior, three batches less one
    half = np.hypot(0.9 * 2 * 0.5, sd * t_6)
    np.testing.assert_allclose(lower.squeeze(1).log1p().numpy(), 9.5 - half, rtol=1e-4)
    np.testing.assert_allclose(upper.squeeze(1).log1p().numpy(), 9.5 + half, rtol=1e-4)


def test_offsets_by_a_loop():
    """As a loop over batches and proteins has it, with proteins that are missing and batches that share too few."""
    rng = np.random.default_rng(0)
    offset = rng.normal(size=(5, 12))
    offset[rng.random(offset.shape) < 0.2] = np.nan
    offset[4, :8] = np.nan
    found, variance = (value.numpy() for value in imputation._from_others(torch.tensor(offset)))

    def pair(b, c, p):
        """Mean difference, its variance and how many proteins tell, without one protein."""
        off = [offset[b, q] - offset[c, q] for q in range(12) if q != p and np.isfinite(offset[[b, c], q]).all()]
        return (np.mean(off), np.var(off, ddof=1) + 0.01, len(off)) if len(off) >= 5 else None

    pairs = {(b, c, p): pair(b, c, p) for b, c, p in np.ndindex(5, 5, 12) if b != c}
    prior = np.exp(np.mean([np.log(one[1]) for one in pairs.values() if one is not None]))
    for b, p in np.ndindex(offset.shape):
        above = below = variances = 0.0
        for c in set(range(5)) - {b}:
            one = pairs[b, c, p]
            if one is not None and np.isfinite(offset[c, p]):
                mean, scatter, n = one
                own = (scatter * (n - 1) + 4 * prior) / (n + 3) * (1 + 1 / n)
                above, below = above + (offset[c, p] + mean) / scatter, below + 1 / scatter
                variances += own / scatter
        expected_values = (above / below, variances / below) if below else (np.nan, np.nan)
        np.testing.assert_allclose((found[b, p], variance[b, p]), expected_values)


@pytest.mark.parametrize(("n_batches", "n_shared"), [(3, 5), (3, 12), (12, 5), (12, 12)])
def test_what_a_kit_lacks_is_not_claimed_too_surely(n_batches, n_shared):
    """Kits of offsets that know nothing of each other: their own truth in 90 of 100 intervals, about."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        truth = rng.normal(size=(n_batches, n_shared + 10)) + rng.normal(size=(n_batches, 1))
        seen = truth.copy()
        seen[0, n_shared:] = np.nan
        guess, variance = imputation._from_others(torch.tensor(seen))
        off = np.abs(guess[0, n_shared:].numpy() - truth[0, n_shared:])
        held.append(off < 1.9 * variance[0, n_shared:].sqrt().numpy())  # Student's t, some eight degrees of freedom
    assert 0.85 < np.mean(held) < 0.99, np.mean(held)  # what several kits tell is better than what one does


def test_one_batch_has_no_offset():
    found = imputation._aligned(landmarks_of(np.zeros((1, 4))))
    assert found.between is None and not found.offset.any()
    few = landmarks_of(np.zeros((2, 4)))  # of the second too few to tell
    few = few._replace(batch=(torch.arange(600) > 590).long())
    assert imputation._aligned(few).between is None


def test_batches_that_cannot_be_compared_are_no_damage():
    """Two large batches with nothing in common and two small ones that have all: what is kept can be read again."""
    offset = np.random.default_rng(0).normal(size=(4, 10))
    part = landmarks_of(offset)
    keep = torch.cat([torch.arange(600), torch.arange(600, 624), torch.arange(900, 924)])
    part = imputation._only(part, keep)
    part.y[part.batch == 0, 5:], part.y[part.batch == 1, :5] = torch.nan, torch.nan
    found = imputation._aligned(part)
    assert found.between is None and found.offset.isfinite().all() and found.y[part.y.isfinite()].isfinite().all()


def test_small_and_many_batches_have_a_scale(monkeypatch):
    """Those that are not put on one scale together are by those that are; unequal sizes do not tilt it."""
    monkeypatch.setattr(imputation, "N_BATCHES", 3)
    truth = np.random.default_rng(0).normal(size=(6, 12))
    part = landmarks_of(truth)
    keep = [torch.arange(300 * i, 300 * i + n) for i, n in enumerate((300, 290, 80, 60, 40, 12))]
    found = imputation._aligned(imputation._only(part, torch.cat(keep)))
    centred = truth - truth[:3].mean(0)
    np.testing.assert_allclose(found.offset[:3].numpy(), centred[:3], atol=0.12)
    for batch, n in ((3, 60), (4, 40), (5, 12)):  # of few cells, a part of it
        np.testing.assert_allclose(found.offset[batch].numpy(), centred[batch] * n / (n + 10), atol=0.3)
    assert not found.apart[:5].any() and torch.equal(found.apart[5], torch.full((12,), 1 / np.sqrt(13)).float())


def test_kits_of_other_scales_are_put_on_one():
    """Neighbours of two kits, each with types of its own, hidden cells of a third: nearer to the truth."""
    mdata, truth = several_kits(3, spread=1.5)
    kind, kit = (mdata.obs[name].astype(str).to_numpy() for name in ("cell_type", "batch"))
    few = np.where(kit == "batch_0", np.isin(kind, ["B", "NK", "pDC"]), np.isin(kind, ["CD4 T", "CD14 Mono"]))
    mdata = mdata[~few | (kit == "batch_2") | (np.random.default_rng(0).random(len(few)) < 0.2)].copy()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=4)
    model = av.get.model(mdata)
    part = model.imputation
    y = part.y + part.offset[part.batch]
    slope, intercept = imputation._ridge(part.components, y)
    new = dict.fromkeys(("offset", "between", "apart"))  # which models of before do not have
    bare = part._replace(y=y, slope=slope, intercept=intercept, **new)
    hidden = mdata.obs_names[(mdata.obs["batch"] == "batch_2").to_numpy()]

    def right(part: Imputation) -> float:
        options = {"modality": "prot", "include_background": True, "inplace": False}
        found = av.tl.denoise(mdata, model=replace(model, imputation=part), **options)["prot"].to_pandas().loc[hidden]
        pairs = [np.log1p([found[name], truth.loc[hidden, name]]) for name in truth]
        return float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]))

    assert right(part) > right(bare) + 0.05


def test_cells_of_a_measured_batch_are_on_its_scale():
    """Cells without proteins in a batch where others have them: what is imputed is as high as what these have."""
    mdata, truth = several_kits(3, spread=1.5)
    stained = mdata["prot"].obs_names
    without = stained[::5]
    mdata = MuData({"rna": mdata["rna"].copy(), "prot": mdata["prot"][stained.difference(without)].copy()})
    whole = several_kits(3, spread=1.5)[0]
    for column in ("batch", "cell_type"):
        mdata.obs[column] = whole.obs[column].reindex(mdata.obs_names)
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=4)
    options = {"modality": "prot", "include_background": True, "inplace": False, "return_interval": 0.9}
    found = av.tl.denoise(mdata, **options)
    value, lower, upper = (found[name].to_pandas().loc[without] for name in ("prot", "prot_lower", "prot_upper"))
    real = truth.loc[without]
    batch = mdata.obs["batch"].loc[without].to_numpy()
    off = (np.log1p(value) - np.log1p(real)).groupby(batch).mean()
    assert np.abs(off).to_numpy().mean() < 0.15
    assert ((real >= lower) & (real <= upper)).mean().mean() > 0.85
    # and such an interval is not widened by what other kits are off
    new = mdata.obs_names[(mdata.obs["batch"] == "batch_2").to_numpy()]
    widths = [
        (np.log1p(found["prot_upper"]) - np.log1p(found["prot_lower"])).to_pandas().loc[c] for c in (without, new)
    ]
    assert widths[1].mean().mean() > widths[0].mean().mean() + 0.5


def test_intervals_hold_in_a_new_kit():
    """Five measured kits, one more that none was: held counts over kits and proteins, beside the former intervals."""
    held = {"between": [], "within": []}
    for seed in range(4):
        mdata, truth = several_kits(6, spread=0.7, seed=seed)
        av.tl.totalvi(mdata, batch_key="batch", max_epochs=2, random_state=seed)
        model = av.get.model(mdata)
        hidden = mdata.obs_names[(mdata.obs["batch"] == "batch_5").to_numpy()]
        for name in held:
            part = model.imputation if name == "between" else model.imputation._replace(between=None)
            options = {"modality": "prot", "include_background": True, "inplace": False, "return_interval": 0.9}
            found = av.tl.denoise(mdata, model=replace(model, imputation=part), **options)
            lower, upper = (found[f"prot_{end}"].to_pandas().loc[hidden, truth.columns] for end in ("lower", "upper"))
            held[name].append(((truth.loc[hidden] >= lower) & (truth.loc[hidden] <= upper)).mean().mean())
    assert 0.87 < np.mean(held["between"]) < 0.95 and np.mean(held["within"]) < 0.8, held


def test_a_query_says_by_some_proteins_how_much_it_counts_of_others():
    """A reference of one kit, a query that counts a fifth of it: half of its proteins were measured, half are asked."""
    whole = cite(1_000, n_genes=80, n_batches=2, n_panels=1, rna_only_batch=False)
    counts, new = whole["prot"].to_df(), (whole.obs["batch"] == "batch_1").to_numpy()
    counts *= 20
    counts[new] = np.random.default_rng(0).poisson(counts[new] / 5)
    parts = []
    for rows, known in ((~new, slice(None)), (new, slice(0, 10))):
        part = MuData(
            {"rna": whole["rna"][rows].copy(), "prot": AnnData(counts[rows].iloc[:, known].astype(np.float32))}
        )
        for column in ("batch", "cell_type"):
            part.obs[column] = whole.obs[column].reindex(part.obs_names)
        parts.append(part)
    reference, query = parts
    av.tl.totalanvi(reference, batch_key="batch", max_epochs=8)
    bare = MuData({"rna": query["rna"].copy()})
    bare.obs = query.obs[["batch", "cell_type"]]
    for data in (query, bare):
        av.tl.map_query(data, reference, max_epochs=4)
    before, after, without = (av.get.model(data).imputation for data in (reference, query, bare))
    assert not after.apart[0].any()  # the reference knows its own scale
    assert torch.equal(after.offset[:1], before.offset) and without.between is None and not without.offset.any()
    asked = counts.columns[10:]
    off = after.offset[1] - after.offset[0]
    np.testing.assert_allclose(off[10:].mean(), -np.log(5), atol=0.35)
    options = {"modality": "prot", "include_background": True, "inplace": False, "return_interval": 0.9}
    found = av.tl.denoise(query, **options)
    lower, upper = (found[name].to_pandas()[asked] for name in ("prot_lower", "prot_upper"))
    real = counts.loc[query.obs_names, asked]
    assert ((real >= lower) & (real <= upper)).mean().mean() > 0.8


def test_what_is_decoded_has_no_interval_and_says_so(half, caplog):
    """A cell without a protein that others of its batch have, beside cells of a batch without any."""
    mdata, _ = half
    stained = mdata["prot"].obs_names[:3]
    counts = mdata["prot"].to_df().astype(np.float32)
    counts.loc[stained, "P03"] = np.nan
    other = MuData({"rna": mdata["rna"].copy(), "prot": AnnData(counts)})
    other.obs["batch"] = mdata.obs["batch"].reindex(other.obs_names)
    options = {"modality": "prot", "include_background": True, "inplace": False, "return_interval": 0.9}
    with av.settings.override(verbosity=1):
        found = av.tl.denoise(other, model=av.get.model(mdata), **options)
    assert found["prot_lower"].to_pandas().loc[stained, "P03"].isna().all()
    assert "3 cells lack proteins that are decoded" in caplog.text
    caplog.clear()
    with av.settings.override(verbosity=1):
        av.tl.denoise(mdata, **options)
    assert "decoded" not in caplog.text


def test_one_measured_batch_is_told(half, caplog):
    mdata, _ = half
    with av.settings.override(verbosity=1):
        av.tl.denoise(mdata, return_interval=0.9)
    assert "the only measured batch is 'batch_0'" in caplog.text


@pytest.mark.parametrize("name", ["offset", "between", "apart"])
def test_damaged_offsets_are_refused(name):
    mdata, _ = several_kits(3)
    av.tl.totalvi(mdata, batch_key="batch", max_epochs=1)
    model = av.get.model(mdata)

    def read(change):
        weights = model.weights()
        changed = change(weights.pop(f"imputation.{name}"))
        weights |= {} if changed is None else {f"imputation.{name}": changed.contiguous()}
        return Model.from_parts(model.facts(), weights, model.history)

    changes = [lambda t: t[:-1], lambda t: t * torch.nan, lambda t: t.double(), lambda t: None]
    changes += [lambda t: -t - 1] if name != "offset" else []
    for change in changes:
        with pytest.raises(ValueError, match="damaged"):
            read(change)
    new = [f"imputation.{one}" for one in ("offset", "between", "apart")]
    weights = {key: value for key, value in model.weights().items() if key not in new}  # as of before
    assert Model.from_parts(model.facts(), weights, model.history).imputation.offset is None


def test_components_explain_what_the_exact_ones_do():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 20)) @ rng.normal(size=(20, 150)) + rng.normal(size=(400, 150))
    loading = imputation._loading(torch.tensor(x, dtype=torch.float32), seed=0).double()
    assert loading.shape == (150, imputation.N_COMPONENTS)
    torch.testing.assert_close(loading.T @ loading, torch.eye(50).double(), atol=1e-5, rtol=0)
    exact = np.linalg.svd(x, compute_uv=False)[:50]
    assert np.linalg.norm(x @ loading.numpy()) ** 2 > 0.999 * np.sum(exact**2)
    before = torch.random.get_rng_state()
    again = imputation._loading(torch.tensor(x, dtype=torch.float32), seed=0).double()
    assert torch.equal(loading, again) and torch.equal(before, torch.random.get_rng_state())
    few = imputation._loading(torch.randn(6, 3), seed=0)  # fewer genes than components
    assert few.shape == (3, 2)
