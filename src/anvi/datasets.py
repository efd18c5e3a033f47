"""Data sets to learn and to test with: one drawn from the models' own generative process, one measured.

:func:`synthetic_cite` needs no file and stores what it drew, so that results can be scored; :func:`pbmc_cite` reads, or
fetches once.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal, get_args

import mudata
import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from mudata import MuData
from scipy import sparse

from ._arguments import RandomState, checked, seed_of
from ._backed import quiet_mudata

__all__ = ["pbmc_cite", "synthetic_cite"]


def __dir__() -> list[str]:
    return __all__


Missing = Literal["absent", "nan", "zero"]
UNLABELED, NO_PANEL = "Unknown", "none"
PBMC_FILE = "pbmc_citeseq.h5mu"
PBMC_URL = (
    "https://raw.githubusercontent.com/YosefLab/totalVI_reproducibility/27d65a9c49182f39df0c4325249bc7dc8e663dd0/data/"
)
PBMC_HASHES = {
    "pbmc_10k_protein_v3.h5ad": "sha256:5f08b8575febf9e04b209b94eb43f6335f1e33b0985cdcf44adf7320f6243c69",
    "pbmc_5k_protein_v3.h5ad": "sha256:a1bf51e070d24b39627ea4de9b3e489a4637ff795e1061e0733e26c3baec8847",
}
"""The cells of two 10x data sets that passed the quality control of the totalVI authors, at one commit of theirs."""
PBMC_CELLS, PBMC_PROTEINS, PBMC_GENES = (6855, 3994), 14, 4000

_CLASS_NAMES = ("B", "CD4 T", "CD8 T", "NK", "CD14 Mono", "pDC")
_RARE_SHARE = 0.02  # of the cells
_MIN_LABELED = 3  # cells of each class that keep their label
_MEDIAN_LIBRARY = 1500.0  # counts, at 400 genes
_MARKER_SHARE, _BATCH_GENE_SHARE, _PROGRAMME_SHARE = 0.05, 0.10, 0.15  # of the genes; the first one per class
_PANEL_LACKS = 0.25  # of the proteins
_P_FOREGROUND, _P_BACKGROUND = 0.97, 0.02  # that a marker protein, any other protein is stained above background


@checked
def synthetic_cite(
    n_obs: int = 2000,
    *,
    n_genes: int = 400,
    n_proteins: int = 20,
    n_classes: int = 6,
    n_batches: int = 3,
    n_panels: int = 2,
    rna_only_batch: bool = True,
    missing: Missing = "absent",
    labeled_fraction: float = 0.5,
    rare_class: bool = True,
    random_state: RandomState = 0,
) -> MuData:
    r"""Draw a CITE-seq data set with known truth from the process that the models assume.

    Of cell :math:`n` in class :math:`c`, batch :math:`b` and panel :math:`k`, with a continuous programme
    :math:`w_n \sim N(0, I_2)`, the genes :math:`g` and the proteins :math:`p` are

    .. math::

        \rho_n &= \mathrm{softmax}(a + M_c + W w_n + S_b), \qquad
        x_{ng} \sim \mathrm{NB}(\ell_n \rho_{ng},\ \theta_g), \qquad \log \ell_n \sim N(m_b, 0.35^2) \\
        \log \beta_{np} &\sim N(A_{pk}, 0.4^2), \qquad v_{np} \sim \mathrm{Bernoulli}(\pi_{cp}), \qquad
        y_{np} \sim \mathrm{NB}(\beta_{np} f_p^{v_{np}},\ \phi_p)

    with marker effects :math:`M` of 1 to 2.5 (natural log) on 5 % of the genes per class, batch shifts :math:`S` on
    other genes, foreground factors :math:`f` of 6 to 20 and :math:`\mathrm{NB}(\mu, \theta)` of variance
    :math:`\mu + \mu^2 / \theta`. Every class has two or three marker proteins, some of them shared by two classes.

    Parameters
    ----------
    n_obs
        Number of cells, at least ten per class and per batch.
    n_genes
        Number of genes, at least three per class and 20 in all. The median library is 1500 counts at 400 genes and
        grows with the square root of `n_genes`: a longer gene list adds mostly genes that are seldom seen.
    n_proteins
        Number of proteins, at least as many as classes and at least 3.
    n_classes
        Number of cell types, at least 2. The common ones differ in size by up to a factor of three.
    n_batches
        Number of batches, all of the same size.
    n_panels
        Number of antibody panels, at most one per batch that has proteins; these batches take the panels in turn.
        `panel_0` holds every protein, each other panel lacks its own quarter of them.
    rna_only_batch
        Whether the last batch has no protein measurement and no labels. Needs two batches.
    missing
        `"absent"`: RNA-only cells are not in the protein modality, proteins that a panel lacks are NaN. `"nan"`: every
        cell is in the protein modality, all that was not measured is NaN. `"zero"`: the same with 0 for NaN.
    labeled_fraction
        Share of the cells of each batch with proteins that keep their label, above 0 and at most 1; at least three
        cells of each class keep it, where these batches have as many.
    rare_class
        Whether the last class has about 2 % of the cells (never fewer than three cells).
    random_state
        Seed of a generator of its own, or a numpy Generator that it is drawn from; None: another one every time. The
        global state is neither read nor changed.

    Returns
    -------
    MuData with counts in `mdata["rna"].X` (float32 CSR) and `mdata["prot"].X` (float32 dense) and the following fields

    `mdata.obs["batch"]`, `mdata.obs["panel"]`, `mdata.obs["cell_type"]`, `mdata.obs["true_cell_type"]`
        Categorical. `"none"` is the panel of RNA-only cells, `"Unknown"` the `cell_type` of unlabelled cells.
    `mdata.obsm["true_programme"]`
        The programme :math:`w`, float32 (cells, 2).
    `mdata.obsm["true_protein_rate"]`, `mdata.obsm["true_foreground"]`, `mdata.obsm["true_protein_counts"]`
        float32 tables (cells, proteins) for every cell and protein, measured or not: mean count, 0 or 1, and the
        count; :func:`anvi.get.table` reads them. RNA-only cells are drawn as if they had been stained with `panel_0`.
    `mdata["rna"].layers["true_scale"]`, `mdata["rna"].layers["true_rate"]`
        :math:`\rho` (rows sum to 1) and :math:`\ell \rho` (mean count), dense float32 (cells, genes).
    `mdata["rna"].varm["true_markers"]`, `mdata["prot"].varm["true_markers"]`
        bool DataFrames (features, classes).
    `mdata["rna"].varm["true_lfc"]`
        float32 DataFrame (genes, classes): log2 of the mean `true_scale` in the class over that in all other cells.
    `mdata["rna"].var["batch_gene"]`, `mdata["rna"].var["true_theta"]`, `mdata["prot"].var["true_theta"]`
        Whether the gene shifts between batches (never a marker), and the inverse dispersions :math:`\theta, \phi`.
    `mdata.uns["truth"]["measured"]`, `mdata.uns["truth"]["foreground_probability"]`
        DataFrames (proteins, panels) of bool, without `"none"`, and (proteins, classes) of float32, :math:`\pi`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of another kind, or out of its range.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(500, random_state=1)
    """
    numbers = {"n_obs": n_obs, "n_genes": n_genes, "n_proteins": n_proteins, "n_classes": n_classes}
    for name, value in (numbers | {"n_batches": n_batches, "n_panels": n_panels}).items():
        if not isinstance(value, int | np.integer):
            raise TypeError(f"{name}={value!r:.80} must be a whole number.")
    n_stained = n_batches - bool(rna_only_batch)  # batches with proteins
    least = 10 * max(n_classes, n_batches)
    for name, value, good, allowed in (
        ("n_classes", n_classes, n_classes >= 2, "at least 2"),
        ("n_batches", n_batches, n_stained >= 1, "at least 1, and at least 2 when rna_only_batch=True"),
        ("n_panels", n_panels, 1 <= n_panels <= n_stained, f"from 1 to {n_stained}, one per batch with proteins"),
        ("n_obs", n_obs, n_obs >= least, f"at least {least}, 10 cells per class and per batch"),
        ("n_genes", n_genes, n_genes >= max(20, 3 * n_classes), "at least 20, and at least 3 per class"),
        ("n_proteins", n_proteins, n_proteins >= max(3, n_classes), "at least 3, and at least n_classes"),
        ("missing", missing, missing in get_args(Missing), f"one of {get_args(Missing)}"),
        ("labeled_fraction", labeled_fraction, 0 < labeled_fraction <= 1, "above 0 and at most 1"),
    ):
        if not good:
            raise ValueError(f"{name} must be {allowed}; got {value!r}.")

    # what every cell is
    rng = np.random.default_rng(seed_of(random_state))
    classes = [*_CLASS_NAMES, *(f"Type {i}" for i in range(len(_CLASS_NAMES) + 1, n_classes + 1))][:n_classes]
    panels = [f"panel_{k}" for k in range(n_panels)]
    cell_class = _draw_classes(rng, n_obs, n_classes, rare_class)  # (cells,)
    batch = rng.permutation(np.arange(n_obs) % n_batches)  # (cells,)
    stained = batch < n_stained  # (cells,)
    panel = np.where(stained, batch % n_panels, 0)  # (cells,), the panel whose background the cell has
    labeled = _choose_labeled(rng, cell_class, np.where(stained, batch, -1), labeled_fraction)  # (cells,)

    # counts, and what of them is observed
    rna, programme = _draw_rna(rng, n_genes, cell_class, batch, classes)
    rna.obs_names = cells = pd.Index([f"cell_{i:05d}" for i in range(1, n_obs + 1)])
    truth, var, markers, p_foreground = _draw_proteins(rng, n_proteins, cell_class, panel, classes)
    measured = pd.DataFrame(True, index=var.index, columns=panels)
    for name in panels[1:]:  # the first panel is complete
        measured.loc[rng.choice(var.index, max(1, round(_PANEL_LACKS * n_proteins)), replace=False), name] = False
    seen = measured.to_numpy().T[panel] & stained[:, None]  # (cells, proteins)
    kept = stained | (missing != "absent")  # (cells,)
    observed = np.where(seen, truth["protein_counts"], np.float32(0 if missing == "zero" else np.nan))[kept]
    prot = AnnData(observed, obs=pd.DataFrame(index=cells[kept]), var=var, varm={"true_markers": markers})

    # the object, and the truth beside it
    with quiet_mudata():
        mdata = MuData({"rna": rna, "prot": prot})
    for column, codes, names in (
        ("batch", batch, [f"batch_{b}" for b in range(n_batches)]),
        ("panel", np.where(stained, panel, n_panels), [*panels, NO_PANEL]),
        ("cell_type", np.where(labeled, cell_class, n_classes), [*classes, UNLABELED]),
        ("true_cell_type", cell_class, classes),
    ):
        mdata.obs[column] = pd.Categorical.from_codes(codes, names).remove_unused_categories()
    mdata.obsm["true_programme"] = programme
    for name, table in truth.items():
        mdata.obsm[f"true_{name}"] = table
        mdata.uns[f"true_{name}_names"] = np.array(var.index, dtype=object)
    mdata.uns["truth"] = {"measured": measured, "foreground_probability": p_foreground}
    return mdata


@checked
def pbmc_cite(path: str | os.PathLike[str] | None = None) -> MuData:
    """Read 10x PBMC: 10k cells with 14 proteins and labels, and 5k cells with RNA only; downloaded once.

    A file `pbmc_citeseq.h5mu` on disk is read. Without one, the counts of both data sets (43 MB; 10x Genomics, CC BY
    4.0, as filtered by the totalVI authors) are fetched, their checksums compared, and the object is built by stated
    rules: genes that both have, the 4,000 whose Pearson residuals vary most within batches, and cell types by gates on
    protein counts and a few marker genes. It is kept in the user's cache.

    Parameters
    ----------
    path
        The file, or the folder that holds it; if given, the only place that is looked in. None: the folder
        `anvi.settings.data_dir`, then the folder that the environment variable `ANVI_DATA_DIR` names, then the cache,
        then the network.

    Returns
    -------
    MuData with counts in `mdata["rna"].X` (10849 cells, 4000 genes) and `mdata["prot"].X` (6855 cells, 14 proteins)
    and the following fields

    `mdata.obs["batch"]`, `mdata.obs["cell_type"]`
        `"pbmc10k"` or `"pbmc5k"`, the latter without proteins or labels; 14 types, and `"Unknown"` if not labelled.

    Raises
    ------
    FileNotFoundError
        If the file is in none of these places and cannot be fetched.
    ValueError
        If a fetched file is not the one that is meant.

    Notes
    -----
    The file behind the figures of the documentation has the same cells, proteins and types, but its genes were chosen
    and its labels given by another procedure: the gates agree with 93 % of those labels.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.pbmc_cite()  # doctest: +SKIP
    >>> av.tl.totalanvi(mdata, batch_key="batch")  # doctest: +SKIP
    """
    from .settings import settings

    places = {"settings.data_dir": settings.data_dir, "$ANVI_DATA_DIR": os.environ.get("ANVI_DATA_DIR")}
    places = places if path is None else {"path": path}
    looked = []
    for source, place in places.items():
        file = Path(place or PBMC_FILE).expanduser()
        if place and file.is_dir():
            file /= PBMC_FILE
        if place and file.is_file():
            with quiet_mudata():
                return mudata.read_h5mu(file)
        looked.append(f"{source} ({file if place else 'not set'})")
    import pooch  # here: most sessions fetch nothing

    failed = "path= is the only place that is looked in"
    if path is None:
        cache = Path(pooch.os_cache("anvi"))
        try:
            if not (cache / PBMC_FILE).is_file():
                _build_pbmc(*_fetch_pbmc(cache, progress=settings.progress)).write(cache / f"{PBMC_FILE}.part")
                os.replace(cache / f"{PBMC_FILE}.part", cache / PBMC_FILE)
            with quiet_mudata():
                return mudata.read_h5mu(cache / PBMC_FILE)
        except OSError as error:  # no network, no such address, no room
            failed = f"fetching it from {PBMC_URL} into {cache} failed: {type(error).__name__}: {error}"
    raise FileNotFoundError(
        f"{PBMC_FILE} was not found; looked in {', '.join(looked)}; {failed}. Set the environment variable "
        f"ANVI_DATA_DIR to the folder that holds it, or pass path=. Without a network, "
        "av.datasets.synthetic_cite() draws a data set that needs no file."
    )


def _fetch_pbmc(cache: Path, *, progress: bool) -> list[AnnData]:
    """Both published files, from the cache or the network."""
    import pooch

    files = [
        pooch.retrieve(f"{PBMC_URL}{name}", known_hash=known, fname=name, path=cache, progressbar=progress)
        for name, known in PBMC_HASHES.items()
    ]
    with warnings.catch_warnings():  # files of an older anndata
        warnings.simplefilter("ignore")
        return [read_h5ad(file) for file in files]


def _build_pbmc(ten: AnnData, five: AnnData) -> MuData:
    """The object that `pbmc_cite` documents, from the two published ones."""
    import scanpy

    for adata, n_cells, name in zip((ten, five), PBMC_CELLS, PBMC_HASHES, strict=True):
        table = adata.obsm.get("protein_expression")
        if adata.n_obs != n_cells or table is None or "protein_names" not in adata.uns:
            raise ValueError(f"{name} is not the file that is meant: {n_cells} cells with protein_expression in obsm.")
    genes = ten.var_names[ten.var_names.isin(five.var_names)]
    parts, names = [], []
    for adata, prefix in ((ten, "10k"), (five, "5k")):
        parts.append(sparse.csr_matrix(adata[:, genes].X, dtype=np.float32))
        names += [f"{prefix}_{barcode}" for barcode in adata.obs_names]
    rna = AnnData(sparse.vstack(parts, format="csr"), obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))
    batch = np.repeat(["pbmc10k", "pbmc5k"], [ten.n_obs, five.n_obs])

    proteins = list(map(str, ten.uns["protein_names"]))
    counts = pd.DataFrame(np.asarray(ten.obsm["protein_expression"], np.float32), names[: ten.n_obs], proteins)
    counts = counts[sorted(proteins)].rename(columns=lambda name: name.removesuffix("_TotalSeqB"))
    if counts.shape[1] != PBMC_PROTEINS:
        raise ValueError(f"{next(iter(PBMC_HASHES))} has {counts.shape[1]} proteins, not {PBMC_PROTEINS}.")
    labels = np.append(_gate(counts, rna[: ten.n_obs]), [UNLABELED] * five.n_obs)

    rna.obs["batch"] = pd.Categorical(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's of pandas
        variable = scanpy.experimental.pp.highly_variable_genes(
            rna, n_top_genes=min(PBMC_GENES, rna.n_vars), batch_key="batch", inplace=False
        )["highly_variable"]
    del rna.obs["batch"]
    with quiet_mudata():
        mdata = MuData({"rna": rna[:, np.asarray(variable)].copy(), "prot": AnnData(counts)})
    mdata.obs["batch"], mdata.obs["cell_type"] = pd.Categorical(batch), pd.Categorical(labels)
    return mdata


def _gate(protein: pd.DataFrame, rna: AnnData) -> np.ndarray:
    """Cell types by protein counts and marker genes, the first gate that holds: (cells,) names."""

    def genes(*names: str) -> np.ndarray:
        return np.asarray(rna[:, list(names)].X.sum(1)).ravel()

    p = protein
    t_cell, b_cell, cd4, cd8 = p["CD3"] > 300, p["CD19"] > 100, p["CD4"] > 400, p["CD8a"] > 400
    naive = p["CD45RA"] > p["CD45RO"]
    two_cells = (t_cell & (b_cell | (p["CD14"] > 300))) | (b_cell & (p["CD14"] > 300))
    gates = {
        UNLABELED: two_cells | (p["CD15"] > 400),  # doublets, granulocytes
        "pDC": ~t_cell & (genes("LILRA4", "CLEC4C", "SERPINF1") >= 5),
        "B Naive": b_cell & (genes("TCL1A", "IGHD") >= 3),
        "B Memory": b_cell,
        "Treg": t_cell & cd4 & ~cd8 & (p["CD25"] > 90) & (p["CD127"] < 75),
        "CD4 Naive": t_cell & cd4 & ~cd8 & naive,
        "CD4 Memory": t_cell & cd4 & ~cd8,
        "gdT": t_cell & ~cd4 & (genes("TRDC") >= 1) & (~cd8 | (genes("KLRB1") >= 3)) & (p["CD8a"] <= 1000),
        "MAIT": t_cell & ~cd4 & (genes("KLRB1") >= 4),
        "CD8 Naive": t_cell & cd8 & ~cd4 & naive & (p["CD127"] > 60),
        "CD8 Memory": t_cell & cd8 & ~cd4,
        "CD14 Mono": ~t_cell & (p["CD14"] > 250),
        "cDC": ~t_cell & (genes("FCER1A", "CD1C", "CLEC10A") >= 5),
        "CD16 Mono": ~t_cell & (genes("MS4A7", "CDKN1C", "LYZ") >= 10),
        "NK": ~t_cell & (genes("NKG7", "GNLY") >= 10),
    }
    return np.select([np.asarray(gate) for gate in gates.values()], list(gates), UNLABELED)


def _draw_classes(rng: np.random.Generator, n_obs: int, n_classes: int, rare_class: bool) -> np.ndarray:
    """Draw the class of each cell: (cells,). The sizes are fixed, so that a small data set lacks no class."""
    share = np.linspace(1.5, 0.5, n_classes - bool(rare_class))
    share /= share.sum()
    if rare_class:
        rare = max(_RARE_SHARE, (_MIN_LABELED + 1) / n_obs)
        share = np.append((1 - rare) * share, rare)
    return rng.permutation(np.searchsorted(np.cumsum(share), (np.arange(n_obs) + 0.5) / n_obs))


def _choose_labeled(rng: np.random.Generator, cell_class: np.ndarray, batch: np.ndarray, share: float) -> np.ndarray:
    """Choose `share` of the cells of each batch, and a few of each class whatever its size; none where batch is -1."""
    rank = rng.random(len(batch))  # the cells of lowest rank keep their label
    for c in np.unique(cell_class):
        members = np.flatnonzero((cell_class == c) & (batch >= 0))
        rank[members[np.argsort(rank[members])[:_MIN_LABELED]]] -= 1
    labeled = rank < 0
    for b in np.unique(batch[batch >= 0]):
        members = np.flatnonzero(batch == b)
        labeled[members[np.argsort(rank[members])[: round(share * len(members))]]] = True
    return labeled


def _draw_counts(rng: np.random.Generator, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Draw NB counts as Poisson counts of a gamma rate: variance mean + mean^2 / theta, float32."""
    gamma = rng.standard_gamma(theta, size=mean.shape, dtype=np.float32)
    return rng.poisson(mean * (gamma / theta)).astype(np.float32)


def _draw_rna(
    rng: np.random.Generator, n_genes: int, cell_class: np.ndarray, batch: np.ndarray, classes: list[str]
) -> tuple[AnnData, np.ndarray]:
    """Draw the RNA modality with its truth, and the programme (cells, 2)."""
    n_classes, n_batches = len(classes), batch.max() + 1
    n_shifted = round(_BATCH_GENE_SHARE * n_genes) if n_batches > 1 else 0
    n_markers = max(1, min(round(_MARKER_SHARE * n_genes), (n_genes - n_shifted) // (n_classes + 1)))
    n_loaded = min(round(_PROGRAMME_SHARE * n_genes), n_genes - n_shifted - n_markers * n_classes)
    # one role per gene: a gene that marks a class moves with nothing else, so its fold change is that of the class
    ends = np.cumsum([n_shifted, n_markers * n_classes, n_loaded])
    shifted, marking, loaded, _ = np.split(rng.permutation(n_genes), ends)

    abundance = rng.normal(0.0, 3.2, n_genes).clip(max=6.0)  # (genes,), natural log; no gene takes half of the library
    # markers can be seen, but are not among the most abundant genes: one of these, up tenfold, pushes all others down
    abundance[marking] = rng.normal(0.7, 1.0, marking.size).clip(max=2.0)
    effect = np.zeros((n_classes, n_genes))
    effect[np.repeat(np.arange(n_classes), n_markers), marking] = rng.uniform(1.0, 2.5, marking.size)
    loading = np.zeros((2, n_genes), dtype=np.float32)
    loading[:, loaded] = rng.normal(0.0, 0.5, (2, n_loaded))
    shift = np.zeros((n_batches, n_genes))
    shift[:, shifted] = rng.normal(0.0, 0.8, (n_batches, n_shifted))

    programme = rng.standard_normal((len(batch), 2), dtype=np.float32)
    logits = (abundance + effect[cell_class] + shift[batch]).astype(np.float32) + programme @ loading  # (cells, genes)
    scale = np.exp(logits - logits.max(1, keepdims=True))
    scale /= scale.sum(1, keepdims=True)
    depth = rng.normal(0.0, 0.2, n_batches)  # (batches,), centred below: the median over all cells is as documented
    depth += np.log(_MEDIAN_LIBRARY * np.sqrt(n_genes / 400)) - depth.mean()
    library = np.exp(rng.normal(depth[batch], 0.35)).astype(np.float32)  # (cells,), counts
    rate = library[:, None] * scale
    theta = np.exp(rng.normal(np.log(2.0), 0.5, n_genes)).astype(np.float32)

    inside = np.equal.outer(np.arange(n_classes), cell_class).astype(np.float64)  # (classes, cells)
    mean_in, mean_out = (w @ scale / w.sum(1, keepdims=True) for w in (inside, 1 - inside))  # (classes, genes)
    var = pd.DataFrame(index=[f"G{i:03d}" for i in range(1, n_genes + 1)])
    var["batch_gene"], var["true_theta"] = np.isin(np.arange(n_genes), shifted), theta
    rna = AnnData(sparse.csr_matrix(_draw_counts(rng, rate, theta)), var=var)
    rna.layers["true_scale"], rna.layers["true_rate"] = scale, rate
    rna.varm["true_markers"] = pd.DataFrame(effect.T > 0, index=var.index, columns=classes)
    lfc = np.log2(mean_in / mean_out).T.astype(np.float32)  # (genes, classes)
    rna.varm["true_lfc"] = pd.DataFrame(lfc, index=var.index, columns=classes)
    return rna, programme


def _draw_proteins(
    rng: np.random.Generator, n_proteins: int, cell_class: np.ndarray, panel: np.ndarray, classes: list[str]
) -> tuple[dict[str, np.ndarray], pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Draw the truth of every cell, each (cells, proteins); the var table; markers and pi, both (proteins, classes)."""
    n_classes = len(classes)
    markers = np.zeros((n_proteins, n_classes), dtype=bool)
    step = 2 if n_proteins >= 2 * n_classes else 1  # with few proteins, each is shared by two neighbouring classes
    for c in range(n_classes):
        markers[[step * c, (step * c + 1) % n_proteins], c] = True
    # pairs of classes share one of the proteins that are left, as CD4 T and CD8 T share CD3
    for p, c in zip(range(2 * n_classes, n_proteins), range(1, n_classes - 1, 2), strict=False):
        markers[p, c : c + 2] = True
    markers = rng.permutation(markers)  # rows: the order of the proteins tells nothing
    p_foreground = np.where(markers, _P_FOREGROUND, _P_BACKGROUND).astype(np.float32)

    panel_effect = rng.normal(0.0, 0.25, (panel.max() + 1, n_proteins))
    mean = rng.normal(np.log(8.0), 0.5, n_proteins) + panel_effect  # (panels, proteins), log counts of background
    factor = rng.uniform(6.0, 20.0, n_proteins)
    phi = np.exp(rng.normal(np.log(12.0), 0.4, n_proteins)).astype(np.float32)
    background = np.exp(rng.normal(mean[panel], 0.4))  # (cells, proteins)
    foreground = rng.random(background.shape) < p_foreground.T[cell_class]
    rate = np.where(foreground, background * factor, background).astype(np.float32)
    counts = _draw_counts(rng, rate, phi)
    var = pd.DataFrame({"true_theta": phi}, index=[f"P{i:02d}" for i in range(1, n_proteins + 1)])
    truth = {"protein_rate": rate, "foreground": foreground.astype(np.float32), "protein_counts": counts}
    return truth, var, *(pd.DataFrame(t, index=var.index, columns=classes) for t in (markers, p_foreground))
