import os
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pooch
import pytest
from anndata import AnnData, read_h5ad
from mudata import MuData, read_h5mu
from scipy import sparse

from anvi import datasets, get
from anvi.settings import settings

CLASSES = ["B", "CD4 T", "CD8 T", "NK", "CD14 Mono", "pDC"]

# Draws are independent given their stored means and variances, so sums of them are normal and the tolerances below are
# standard errors: 5 of them are exceeded by chance once in 1.7 million draws (and the seed is fixed).
N_SE = 5


@pytest.fixture(scope="module")
def mdata() -> MuData:
    """Shared by the tests of this file: never written to."""
    return datasets.synthetic_cite()


def arrays(mdata: MuData) -> dict[str, np.ndarray]:
    """Everything that a data set holds, as arrays by name."""
    found = {"rna counts": mdata["rna"].X.toarray(), "prot counts": mdata["prot"].X}
    found |= {f"layers {name}": mdata["rna"].layers[name] for name in ("true_scale", "true_rate")}
    for name, axis in (("mdata", mdata), ("rna", mdata["rna"]), ("prot", mdata["prot"])):
        found |= {f"{name} obs {k}": np.asarray(axis.obs[k]).astype(str) for k in axis.obs}
        found[f"{name} names"] = np.asarray([*axis.obs_names, *axis.var_names], dtype=str)
    found |= {k: np.asarray(v) for k, v in mdata.obsm.items()}
    found |= {f"truth {k}": v.to_numpy() for k, v in mdata.uns["truth"].items()}
    for mod in ("rna", "prot"):
        found |= {f"{mod} varm {k}": v.to_numpy() for k, v in mdata[mod].varm.items()}
        found |= {f"{mod} var {k}": v.to_numpy() for k, v in mdata[mod].var.items()}
    return found


def standardised(counts: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    mean, theta = mean.astype(np.float64), theta.astype(np.float64)
    return (counts - mean) / np.sqrt(mean + mean**2 / theta)


def rna_counts_mean_theta(mdata: MuData) -> tuple[np.ndarray, ...]:
    rna = mdata["rna"]
    return rna.X.toarray(), rna.layers["true_rate"], rna.var["true_theta"].to_numpy()


def protein_counts_mean_theta(mdata: MuData) -> tuple[np.ndarray, ...]:
    tables = (
        get.table(mdata, "true_protein_counts"),
        get.table(mdata, "true_protein_rate"),
        mdata["prot"].var["true_theta"],
    )
    return tuple(table.to_numpy() for table in tables)


DRAWS = pytest.mark.parametrize("draws", [rna_counts_mean_theta, protein_counts_mean_theta], ids=["rna", "protein"])


def test_shapes_names_and_dtypes(mdata):
    rna, prot = mdata["rna"], mdata["prot"]
    assert rna.shape == (2000, 400)
    assert prot.shape[1] == 20
    assert sparse.issparse(rna.X) and rna.X.format == "csr" and rna.X.dtype == np.float32
    assert isinstance(prot.X, np.ndarray) and prot.X.dtype == np.float32
    assert list(mdata.obs_names) == list(rna.obs_names) == [f"cell_{i:05d}" for i in range(1, 2001)]
    assert [rna.var_names[0], rna.var_names[-1], prot.var_names[0], prot.var_names[-1]] == [
        "G001",
        "G400",
        "P01",
        "P20",
    ]
    assert rna.X.data.min() >= 1 and np.all(rna.X.data % 1 == 0)
    for name in ("true_scale", "true_rate"):
        assert rna.layers[name].dtype == np.float32 and rna.layers[name].shape == rna.shape
    np.testing.assert_allclose(rna.layers["true_scale"].sum(1, dtype=np.float64), 1, rtol=1e-5)  # float32 sum of 400
    for name in ("true_protein_rate", "true_foreground", "true_protein_counts"):
        table = get.table(mdata, name)
        assert table.shape == (2000, 20) and (table.dtypes == np.float32).all()
        assert table.index.equals(mdata.obs_names) and list(table.columns) == list(prot.var_names)
    assert set(np.unique(get.table(mdata, "true_foreground"))) == {0, 1}
    for mod in (rna, prot):
        markers = mod.varm["true_markers"]
        assert list(markers.columns) == CLASSES and set(map(str, markers.dtypes)) == {"bool"}
    assert (rna.varm["true_lfc"].dtypes == np.float32).all()
    assert rna.var["batch_gene"].dtype == bool
    assert "measured" not in prot.varm  # this slot is for the verb that finds it out


def test_annotations_are_global_only_and_categorical(mdata):
    assert mdata["rna"].obs.shape[1] == mdata["prot"].obs.shape[1] == 0
    assert list(mdata.obs["batch"].cat.categories) == ["batch_0", "batch_1", "batch_2"]
    assert list(mdata.obs["panel"].cat.categories) == ["panel_0", "panel_1", "none"]
    assert list(mdata.obs["cell_type"].cat.categories) == [*CLASSES, "Unknown"]
    assert list(mdata.obs["true_cell_type"].cat.categories) == CLASSES
    panel_of_batch = mdata.obs.groupby("batch", observed=True)["panel"].unique().map(list).to_dict()
    assert panel_of_batch == {"batch_0": ["panel_0"], "batch_1": ["panel_1"], "batch_2": ["none"]}
    share = (mdata.obs["true_cell_type"] == "pDC").mean()
    assert share == pytest.approx(0.02, abs=1 / 2000)  # sizes are fixed, up to one cell


def test_more_classes_than_names_are_numbered():
    mdata = datasets.synthetic_cite(200, n_classes=8)
    assert list(mdata.obs["true_cell_type"].cat.categories) == [*CLASSES, "Type 7", "Type 8"]


def test_real_like_scale(mdata):
    """Ranges that were asked for, not measured ones."""
    counts = mdata["rna"].X
    assert 0.60 < 1 - counts.nnz / np.prod(counts.shape) < 0.85
    assert 1350 < np.median(np.asarray(counts.sum(1))) < 1650


def test_same_seed_same_bits_and_other_seed_other_data(mdata):
    first, again = arrays(mdata), arrays(datasets.synthetic_cite())
    other = arrays(datasets.synthetic_cite(random_state=1))
    for name, value in first.items():
        assert value.dtype == again[name].dtype
        np.testing.assert_array_equal(value, again[name], err_msg=name)
    for name in ("rna counts", "true_protein_counts", "layers true_scale", "mdata obs true_cell_type"):
        assert not np.array_equal(first[name], other[name]), name


def test_global_random_state_is_neither_read_nor_changed(mdata):
    np.random.seed(3)
    before = np.random.get_state()
    drawn = datasets.synthetic_cite()
    after = np.random.get_state()
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2] == after[2]
    np.testing.assert_array_equal(drawn["rna"].X.toarray(), mdata["rna"].X.toarray())


@pytest.mark.parametrize("missing", ["absent", "nan", "zero"])
def test_missing_variants_hide_entries_of_the_same_draw(missing):
    other = datasets.synthetic_cite(300, missing=missing)
    prot, truth = other["prot"], get.table(datasets.synthetic_cite(300), "true_protein_counts")
    pd.testing.assert_frame_equal(get.table(other, "true_protein_counts"), truth)
    rna_only = other.obs_names[other.obs["batch"] == "batch_2"]
    if missing == "absent":
        assert list(prot.obs_names) == [name for name in other.obs_names if name not in set(rna_only)]
    else:
        assert list(prot.obs_names) == list(other.obs_names)

    measured = other.uns["truth"]["measured"].assign(none=False)  # (proteins, panels)
    seen = measured[other.obs.loc[prot.obs_names, "panel"].astype(str)].to_numpy().T  # (cells of prot, proteins)
    np.testing.assert_array_equal(prot.X[seen], truth.loc[prot.obs_names].to_numpy()[seen])
    hidden = prot.X[~seen]
    assert hidden.size > 0
    assert np.all(hidden == 0) if missing == "zero" else np.all(np.isnan(hidden))


def test_first_panel_is_complete_and_others_lack_a_quarter():
    mdata = datasets.synthetic_cite(400, n_batches=5, n_panels=3)
    measured = mdata.uns["truth"]["measured"]
    assert list(measured.index) == list(mdata["prot"].var_names)
    assert set(map(str, measured.dtypes)) == {"bool"}
    assert (~measured).sum().to_dict() == {"panel_0": 0, "panel_1": 5, "panel_2": 5}
    assert not measured["panel_1"].equals(measured["panel_2"])
    pairs = set(zip(mdata.obs["batch"].astype(str), mdata.obs["panel"].astype(str), strict=True))
    panels = ["panel_0", "panel_1", "panel_2", "panel_0", "none"]
    assert pairs == {(f"batch_{b}", panel) for b, panel in enumerate(panels)}


@pytest.mark.parametrize("n_batches", [1, 2])
def test_one_panel_and_no_rna_only_batch(n_batches):
    mdata = datasets.synthetic_cite(200, n_batches=n_batches, n_panels=1, rna_only_batch=False)
    assert mdata["prot"].n_obs == 200
    assert not np.isnan(mdata["prot"].X).any()
    assert set(mdata.obs["panel"]) == {"panel_0"}
    assert mdata["rna"].var["batch_gene"].any() == (n_batches > 1)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 1.0])
def test_labels(fraction):
    mdata = datasets.synthetic_cite(600, labeled_fraction=fraction)
    obs = mdata.obs
    labeled = obs["cell_type"] != "Unknown"
    assert (obs["cell_type"][labeled].astype(str) == obs["true_cell_type"][labeled].astype(str)).all()
    assert not labeled[obs["batch"] == "batch_2"].any()
    stained = obs["batch"] != "batch_2"
    available = obs["true_cell_type"][stained].value_counts()
    kept = obs["true_cell_type"][labeled].value_counts()
    assert (kept >= np.minimum(available, 3)[kept.index]).all()
    if fraction == 0.02:  # 4 cells of each batch are fewer than the 3 of each class that always keep their label
        assert (kept == np.minimum(available, 3)[kept.index]).all()
    else:
        assert labeled.groupby(obs["batch"], observed=True).sum()[:2].tolist() == [200 * fraction] * 2


def test_fully_labeled_has_no_unknown_category():
    mdata = datasets.synthetic_cite(200, rna_only_batch=False, labeled_fraction=1)
    assert list(mdata.obs["cell_type"].cat.categories) == CLASSES


def test_few_cells_lack_no_class():
    for seed in range(8):
        mdata = datasets.synthetic_cite(60, random_state=seed)
        assert mdata.obs["true_cell_type"].value_counts().min() >= 3


@DRAWS
def test_counts_have_the_stored_means(mdata, draws):
    counts, mean, theta = draws(mdata)
    variance = mean.astype(np.float64) + mean.astype(np.float64) ** 2 / theta
    error = (counts - mean.astype(np.float64)).sum(0) / np.sqrt(variance.sum(0))  # (features,), in standard errors
    assert np.abs(error[mean.sum(0) > 100]).max() < N_SE  # fewer counts than that are not normal in sum
    total = (counts - mean.astype(np.float64)).sum() / np.sqrt(variance.sum())
    assert abs(total) < N_SE


@DRAWS
def test_counts_have_negative_binomial_variance(mdata, draws):
    counts, mean, theta = draws(mdata)
    expected = mean > 1  # squares of rarer counts are too heavy-tailed for a mean of them to be normal
    square = standardised(counts, mean, theta)[expected] ** 2
    error = square.std() / np.sqrt(square.size)
    assert error < 0.02
    assert abs(square.mean() - 1) < N_SE * error
    # neither Poisson, nor theta confused with its reciprocal
    assert ((counts - mean) ** 2 / mean)[expected].mean() > 1.2
    reciprocal = standardised(counts, mean, 1 / theta)[expected] ** 2
    assert abs(reciprocal.mean() - 1) > N_SE * error


def test_rate_is_library_times_scale_and_library_differs_between_cells(mdata):
    library = mdata["rna"].layers["true_rate"].sum(1)
    expected = library[:, None] * mdata["rna"].layers["true_scale"]
    np.testing.assert_allclose(mdata["rna"].layers["true_rate"], expected, rtol=1e-5)  # float32 sum of 400
    assert 0.3 < np.log(library).std() < 0.6


def test_marker_genes(mdata):
    rna, truth = mdata["rna"], mdata.obs["true_cell_type"]
    markers, lfc = rna.varm["true_markers"], rna.varm["true_lfc"]
    assert (markers.sum() == 20).all()  # 5 % of 400
    assert lfc.to_numpy()[markers].min() > 1  # effects are at least 1 / ln 2 = 1.44; the softmax takes a little
    assert not (markers.any(axis=1) & rna.var["batch_gene"]).any()
    scale = rna.layers["true_scale"].astype(np.float64)
    for name in CLASSES:
        inside = (truth == name).to_numpy()
        # a marker can be seen: 2 counts in 40 cells, the size of the rarest class
        assert rna.layers["true_rate"][inside][:, markers[name]].mean(0).min() > 0.05
        np.testing.assert_allclose(lfc[name], np.log2(scale[inside].mean(0) / scale[~inside].mean(0)), atol=1e-4)


def test_batch_genes_move_with_the_batch_and_others_do_not(mdata):
    """Logits relative to genes without any role: what is left of a gene in one class is its programme and batch."""
    logits = np.log(mdata["rna"].layers["true_scale"].astype(np.float64))
    of_class = (mdata.obs["true_cell_type"] == "B").to_numpy()
    batch = mdata.obs["batch"].to_numpy()
    means = np.stack([logits[of_class & (batch == b)].mean(0) for b in ("batch_0", "batch_1", "batch_2")])
    spread = (means - np.median(means, axis=1, keepdims=True)).std(0)  # (genes,), over batches
    shifted = mdata["rna"].var["batch_gene"].to_numpy()
    assert shifted.sum() == 40
    assert np.median(spread[shifted]) > 0.4  # shifts have sd 0.8
    assert np.median(spread[~shifted]) < 0.05  # only programme genes differ: by 0.5 / sqrt(200 cells)


def test_latent_is_not_class_alone(mdata):
    """Within a class the programme explains what a class mean leaves over."""
    of_class = (mdata.obs["true_cell_type"] == "B").to_numpy()
    logits = np.log(mdata["rna"].layers["true_scale"][of_class].astype(np.float64))
    programme = mdata.obsm["true_programme"][of_class]
    correlation = np.abs(np.corrcoef(programme[:, 0], logits.T)[0, 1:])
    assert (correlation > 0.5).sum() > 20  # of 60 loaded genes


def test_marker_proteins_and_foreground(mdata):
    markers = mdata["prot"].varm["true_markers"]
    assert markers.sum().isin([2, 3]).all()
    assert (markers.sum(axis=1) == 2).any()  # some are shared
    assert markers[markers.sum(axis=1) == 1].any().all()  # but every class has one of its own
    assert markers.T.duplicated().sum() == 0  # and no two classes look alike
    pi = mdata.uns["truth"]["foreground_probability"]
    assert set(np.unique(pi.to_numpy()[markers])) == {np.float32(0.97)}
    assert set(np.unique(pi.to_numpy()[~markers])) == {np.float32(0.02)}
    foreground, truth = get.table(mdata, "true_foreground"), mdata.obs["true_cell_type"]
    for name in CLASSES:
        n = (truth == name).sum()
        se = np.sqrt(pi[name] * (1 - pi[name]) / n)
        # half a cell for the steps of a binomial share
        assert ((foreground[truth == name].mean() - pi[name]).abs() < N_SE * se + 0.5 / n).all(), name


@pytest.mark.parametrize(("n_proteins", "n_classes"), [(3, 2), (6, 6), (10, 6), (12, 6), (14, 6), (30, 12)])
def test_every_class_has_two_or_three_marker_proteins(n_proteins, n_classes):
    mdata = datasets.synthetic_cite(200, n_proteins=n_proteins, n_classes=n_classes)
    markers = mdata["prot"].varm["true_markers"]
    assert markers.sum().isin([2, 3]).all()
    assert markers.T.duplicated().sum() == 0


def test_foreground_is_brighter_by_the_factor(mdata):
    """Log rates of a protein have sd 0.4, panel means sd 0.25: medians of 40 cells and more are within 0.5 of log f."""
    rate, foreground = get.table(mdata, "true_protein_rate"), get.table(mdata, "true_foreground") == 1
    for name in mdata["prot"].var_names[foreground.sum() >= 40]:
        ratio = rate[name][foreground[name]].median() / rate[name][~foreground[name]].median()
        assert 6 * np.exp(-0.5) < ratio < 20 * np.exp(0.5)


def test_building_warns_of_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="The 'future.infer_string' option")  # anndata's under pandas 3.1
        warnings.filterwarnings("ignore", message="The inplace keyword in DataFrame.drop")  # mudata's
        datasets.synthetic_cite(100)
    assert said == []


def test_update_copy_and_file_keep_everything(mdata, tmp_path):
    expected = arrays(mdata)
    copy = mdata.copy()
    copy["prot"].obs["new"] = 1.0
    copy.update()
    del copy["prot"].obs["new"]
    mdata.write(tmp_path / "synthetic.h5mu")
    back = read_h5mu(tmp_path / "synthetic.h5mu")
    for other in (copy, back):
        other.obs = other.obs[list(mdata.obs)]  # mudata 0.3 pulls modality columns up
        for name, value in arrays(other).items():
            assert value.dtype.kind == expected[name].dtype.kind, name
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        for name in ("true_protein_rate", "true_foreground", "true_protein_counts"):
            np.testing.assert_array_equal(other.obsm[name], mdata.obsm[name])
        pd.testing.assert_frame_equal(other["rna"].varm["true_lfc"], mdata["rna"].varm["true_lfc"])
        pd.testing.assert_frame_equal(other.uns["truth"]["measured"], mdata.uns["truth"]["measured"])
        assert list(other.obs["cell_type"].cat.categories) == [*CLASSES, "Unknown"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_obs": 59}, "n_obs must be at least 60"),
        ({"n_genes": 19}, "n_genes must be at least 20"),
        ({"n_proteins": 5}, "n_proteins must be at least 3, and at least n_classes"),
        ({"n_classes": 1}, "n_classes must be at least 2"),
        ({"n_batches": 0, "rna_only_batch": False}, "n_batches must be at least 1"),
        ({"n_batches": 1, "n_panels": 1}, "at least 2 when rna_only_batch=True"),
        ({"n_panels": 0}, "n_panels must be from 1 to 2"),
        ({"n_panels": 3}, "n_panels must be from 1 to 2"),
        ({"missing": "none"}, "missing must be one of .*absent.*nan.*zero.*got 'none'"),
        ({"labeled_fraction": 0}, "labeled_fraction must be above 0"),
        ({"labeled_fraction": 1.1}, "labeled_fraction must be above 0 and at most 1; got 1.1"),
        ({"labeled_fraction": float("nan")}, "labeled_fraction must be above 0"),
    ],
)
def test_arguments_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        datasets.synthetic_cite(**options)


@pytest.mark.parametrize("options", [{"n_obs": 300.5}, {"n_obs": "300"}, {"n_batches": 3.0}])
def test_numbers_of_things_are_whole(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))}=.* must be a whole number"):
        datasets.synthetic_cite(**options)


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """Neither file nor network; an empty cache."""
    monkeypatch.setattr(settings, "data_dir", None)
    monkeypatch.delenv("ANVI_DATA_DIR", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(datasets, "PBMC_URL", "http://127.0.0.1:9/")  # nobody is there


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a small file under the name of the real one."""
    folder = tmp_path_factory.mktemp("data")
    datasets.synthetic_cite(60).write(folder / "pbmc_citeseq.h5mu")
    return folder


def test_pbmc_not_found_names_the_places(no_data, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings.data_dir \(not set\), \$ANVI_DATA_DIR \(not set\)"):
        datasets.pbmc_cite()
    monkeypatch.setattr(settings, "data_dir", str(tmp_path / "one"))
    monkeypatch.setenv("ANVI_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as raised:
        datasets.pbmc_cite()
    for part in (
        str(tmp_path / "one"),
        str(tmp_path / "pbmc_citeseq.h5mu"),
        "Set the environment variable ANVI_DATA_DIR",
    ):
        assert part in str(raised.value)


def test_pbmc_is_found_in_each_place(no_data, monkeypatch, stored):
    for path in (str(stored), stored / "pbmc_citeseq.h5mu"):
        assert datasets.pbmc_cite(path).n_obs == 60
    monkeypatch.setenv("ANVI_DATA_DIR", str(stored))
    assert datasets.pbmc_cite().n_obs == 60
    monkeypatch.setattr(settings, "data_dir", str(stored / "nowhere"))
    assert datasets.pbmc_cite().n_obs == 60  # the variable is asked next
    monkeypatch.delenv("ANVI_DATA_DIR")
    monkeypatch.setattr(settings, "data_dir", str(stored))
    assert datasets.pbmc_cite().n_obs == 60


MARKERS = "LILRA4 CLEC4C SERPINF1 TCL1A IGHD TRDC KLRB1 FCER1A CD1C CLEC10A MS4A7 CDKN1C LYZ NKG7 GNLY".split()
PROTEINS = "CD3 CD4 CD8a CD14 CD15 CD16 CD56 CD19 CD25 CD45RA CD45RO PD-1 TIGIT CD127".split()


def published(n_cells: int, genes: list[str], seed: int) -> AnnData:
    """A file as the totalVI authors publish theirs: dense counts, proteins in obsm, their names in uns."""
    rng = np.random.default_rng(seed)
    adata = AnnData(rng.poisson(1.0, (n_cells, len(genes))).astype(np.float32), var=pd.DataFrame(index=genes))
    adata.obs_names = [f"BARCODE{i}-1" for i in range(n_cells)]
    adata.obsm["protein_expression"] = rng.poisson(200, (n_cells, 14))
    adata.uns["protein_names"] = np.array([f"{name}_TotalSeqB" for name in PROTEINS])
    return adata


@pytest.fixture
def server(no_data, monkeypatch, tmp_path):
    """The two files behind an address of this machine; and what was asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    names = list(datasets.PBMC_HASHES)
    published(40, [*MARKERS, *"ABCDE", "ONLY10K"], 0).write(folder / names[0])
    published(20, ["ONLY5K", *"EDCBA", *MARKERS], 1).write(folder / names[1])
    hashes = {name: f"sha256:{pooch.file_hash(str(folder / name))}" for name in names}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets, "PBMC_URL", f"http://127.0.0.1:{http.server_address[1]}/")
        monkeypatch.setattr(datasets, "PBMC_HASHES", hashes)
        monkeypatch.setattr(datasets, "PBMC_CELLS", (40, 20))
        monkeypatch.setattr(datasets, "PBMC_GENES", 12)
        yield folder, asked
        http.shutdown()


def test_pbmc_is_fetched_once_and_built(server, tmp_path):
    folder, asked = server
    mdata = datasets.pbmc_cite()
    assert len(asked) == 2
    assert mdata["rna"].shape == (60, 12) and mdata["prot"].shape == (40, 14)
    assert list(mdata["prot"].var_names) == sorted(PROTEINS, key=lambda name: f"{name}_TotalSeqB")
    assert list(mdata.obs_names[[0, 59]]) == ["10k_BARCODE0-1", "5k_BARCODE19-1"]
    assert mdata.obs["batch"].value_counts().to_dict() == {"pbmc10k": 40, "pbmc5k": 20}
    assert sparse.issparse(mdata["rna"].X) and mdata["rna"].X.dtype == np.float32
    ten, five = (read_h5ad(folder / name) for name in datasets.PBMC_HASHES)
    genes = list(mdata["rna"].var_names)
    assert not {"ONLY10K", "ONLY5K"} & set(genes)
    np.testing.assert_array_equal(mdata["rna"].X.toarray(), np.vstack([ten[:, genes].X, five[:, genes].X]))
    column = PROTEINS.index("CD19")
    np.testing.assert_array_equal(mdata["prot"][:, "CD19"].X[:, 0], ten.obsm["protein_expression"][:, column])
    assert (mdata.obs["cell_type"][mdata.obs["batch"] == "pbmc5k"] == "Unknown").all()
    again = datasets.pbmc_cite()
    assert len(asked) == 2  # from the cache
    np.testing.assert_array_equal(again["rna"].X.toarray(), mdata["rna"].X.toarray())
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_pbmc_of_another_content_is_refused(server, monkeypatch):
    folder, _ = server
    name = next(iter(datasets.PBMC_HASHES))
    published(40, MARKERS, 3).write(folder / name)
    with pytest.raises(ValueError, match="SHA256 hash of downloaded file"):
        datasets.pbmc_cite()
    monkeypatch.setitem(datasets.PBMC_HASHES, name, None)
    published(39, MARKERS, 3).write(folder / name)
    with pytest.raises(ValueError, match="pbmc_10k_protein_v3.h5ad is not the file that is meant: 40 cells"):
        datasets.pbmc_cite()


def test_pbmc_without_a_network_says_what_to_do(no_data):
    with pytest.raises(FileNotFoundError, match=r"fetching it from http://127.0.0.1:9/ .*ConnectionError") as raised:
        datasets.pbmc_cite()
    assert "av.datasets.synthetic_cite() draws a data set that needs no file" in str(raised.value)


@pytest.mark.data
@pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("ANVI_DATA_DIR", ""), "pbmc_citeseq.h5mu")),
    reason="needs pbmc_citeseq.h5mu in ANVI_DATA_DIR",
)
def test_what_is_built_is_what_the_docs_use():
    """The real counts in the published form: the same object comes back, and labels that agree."""
    mdata = datasets.pbmc_cite(os.environ["ANVI_DATA_DIR"])
    prot, parts = mdata["prot"], []
    for prefix in ("10k_", "5k_"):
        part = mdata["rna"][mdata.obs_names.str.startswith(prefix)].copy()
        part.obs_names = part.obs_names.str.removeprefix(prefix)
        parts.append(part)
    order = list(PROTEINS)
    parts[0].obsm["protein_expression"] = prot["10k_" + parts[0].obs_names, order].X
    parts[0].uns["protein_names"] = np.array([f"{name}_TotalSeqB" for name in order])
    parts[1].obsm["protein_expression"], parts[1].uns["protein_names"] = (
        np.zeros((parts[1].n_obs, 1)),
        np.array(["CD3"]),
    )
    built = datasets._build_pbmc(*parts)
    for mod in ("rna", "prot"):
        assert list(built[mod].var_names) == list(mdata[mod].var_names)
        assert list(built[mod].obs_names) == list(mdata[mod].obs_names)
    assert (built["rna"].X != mdata["rna"].X).nnz == 0
    np.testing.assert_array_equal(built["prot"].X, prot.X)
    assert (built.obs["batch"].astype(str) == mdata.obs["batch"].astype(str)).all()
    assert set(built.obs["cell_type"]) == set(mdata.obs["cell_type"])
    ours, theirs = (data.obs["cell_type"][prot.obs_names].astype(str) for data in (built, mdata))
    assert (ours == theirs).mean() > 0.92
    both = (ours != "Unknown") & (theirs != "Unknown")
    assert (ours == theirs)[both].mean() > 0.94
    assert (ours == theirs).groupby(theirs).mean().drop("Unknown").min() > 0.6


def test_pbmc_does_not_replace_a_path_that_is_not_there(no_data, monkeypatch, stored):
    monkeypatch.setenv("ANVI_DATA_DIR", str(stored))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        datasets.pbmc_cite(stored / "elsewhere")


@pytest.mark.data
@pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("ANVI_DATA_DIR", ""), "pbmc_citeseq.h5mu")),
    reason="needs pbmc_citeseq.h5mu in ANVI_DATA_DIR",
)
def test_pbmc_holds_what_the_docstring_says():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mdata = datasets.pbmc_cite()
    assert [warning for warning in said if warning.category.__name__ != "Pandas4Warning"] == []  # mudata's own, of 0.4
    assert mdata["rna"].shape == (10849, 4000)
    assert mdata["prot"].shape == (6855, 14)
    assert set(mdata["prot"].obs_names) == set(mdata.obs_names[mdata.obs["batch"] == "pbmc10k"])
    assert mdata.obs["cell_type"].nunique() == 15
    assert (mdata.obs["cell_type"][mdata.obs["batch"] == "pbmc5k"] == "Unknown").all()
