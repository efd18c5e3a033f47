"""The four fits: tl.totalanvi, tl.totalvi, tl.scanvi, tl.scvi, with the parameter texts that they share."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Unpack

from anvi._arguments import RandomState
from anvi._backed import on_file_together
from anvi._data.containers import Data
from anvi._data.setup import Antibodies, Genes
from anvi._model import Model
from anvi.nn.config import PRESETS, Dispersion, GeneLikelihood

from ._fit import Callback, Options, run_fit

DATA = """data
    MuData with RNA counts in `mdata['rna']` and protein counts in `mdata['prot']`; cells without proteins, NaN
    proteins and partial panels are welcome. Or an AnnData with RNA counts, and proteins in `obsm[prot_obsm]`."""

RNA_DATA = """data
    AnnData with RNA counts, or a MuData that holds them in `mdata['rna']`, or the path of its file, which then gets
    what is written."""

LABELS = """labels_key
    Column with cell types, found in `mdata.obs` or a modality's obs (`"rna:cell_type"` is explicit). Or several, coarse
    to fine, as in `["lineage", "cell_type"]`: the finest value of a cell counts, and a coarse one leaves its classes
    open. Which are these is learned from cells that have both.
label_tree
    More of what lies under what, as in `{"T": ["CD4 T", "CD8 T"]}`; with a single column, whose values may then be
    anywhere in the tree, its levels are called "level_1", "level_2", ... from the coarsest.
unlabeled_category
    This value, NaN, None and "" mark cells whose type is to be predicted.
init
    Key or :class:`~anvi.Model` of a fitted model without labels to start from: its weights are shared by name, the
    background prior is frozen, the warm-up is not repeated.
train
    With `init`: "all" trains the whole network, "label_nets" only the classifier and its two companions.
classification_ratio
    Weight of the mean cross-entropy of labelled cells against the bound of a cell.
label_prior
    p(c): "uniform", "empirical" (label frequencies) or "learned".
linear_classifier
    Classify by one linear layer instead of a small network."""

PANELS = """panel_key
    Column with the antibody panel of each cell; default: the batch.
missing
    What counts as not measured, besides absent cells, NaN and `prot.varm['measured']`: "auto" also takes proteins
    that are zero in a whole panel (and says which), "nan" takes nothing else."""

RNA_MOD = """rna_mod
    Name of the RNA modality of a MuData."""

MODS = """rna_mod, prot_mod
    Names of the modalities of a MuData.
prot_obsm
    For an AnnData: where in obsm the protein counts are; a DataFrame, or an array with its names in
    `uns[f"{prot_obsm}_names"]`.
proteins
    "all"; "targets": without isotype controls and tags of samples, which are told by their names; or a list
    of names."""

FIT = """batch_key
    Column with the batch of each cell, found in `mdata.obs` or a modality's obs; None for one batch.
layer
    Layer with raw counts; a dict gives one per modality; None takes `.X`.
genes
    "highly_variable": those that `var["highly_variable"]` of the RNA marks; "auto": these, where there is such a column
    (not with `objective="scvi-tools"`; with `init`, the genes of its model); "all"; or a list of names. The model has
    no others, library sizes are sums over them, and of the others nothing is copied.
categorical_covariate_keys, continuous_covariate_keys
    Lists of further columns to correct for; continuous ones are standardised by
    the mean and deviation of these cells, which the model keeps for queries (not with `objective="scvi-tools"`).
size_factor_key
    Column with the size factor of each cell, in place of its library size; in any unit.
n_latent
    Dimensions of the latent space; None: {n_latent}.
gene_likelihood
    "nb", "zinb", "poisson"{normal}; None: "{likelihood}".
dispersion
    Inverse dispersion per "gene", "gene-batch", {label_dispersion}"gene-cell"; None: "gene".
max_epochs
    Longest run; None: about 5,000 steps (a third with `init`), between 15 and 400 epochs.
batch_size
    Cells per minibatch.
lr
    Highest learning rate of Adam; falls to a hundredth along a cosine. None: 4e-3.
train_size
    Share of cells to train on, per class; the others judge when to stop.
early_stopping
    Stop when the validation loss has not improved for a fifth of the run. The best weights are kept in any case.
device
    "auto" or a torch device.
random_state
    Seed of everything random in this call; the global random state is neither read nor changed.
key_added
    Prefix of the slots; default: "{name}".
copy
    Return a new object instead of writing into `data`.
checkpoint
    File that is written after every epoch. If it is there, the fit goes on from it and ends with the same weights as
    a fit that was never interrupted.
max_minutes
    End the training in that time after the call, as Ctrl-C does: after the step that is running, with the best weights
    so far. With `checkpoint`, the same call goes on later.
stream
    For a path or an object that lies in a file: True reads the counts anew in every epoch, by blocks in random order,
    so that they need not fit into memory; False keeps them there. None: as the memory allows
    (`settings.stream_above`; "Large data" in the user guide).
callback
    Called after every epoch with its row of the history, a dict of numbers (`epoch`, `train_loss`, `validation_loss`,
    ...), as trackers want it: `wandb.log`. What it raises ends the fit, and nothing is written.
**model_kwargs
    Rarer options of the network (:class:`anvi.nn.Config`: `n_hidden`, `n_layers_encoder`, `use_layer_norm`, `library`,
    `objective`, ...) and of the training (`weight_decay`, `warmup`, `patience`, `adversary`, ...); an unknown name is
    an error."""

RAISES = """KeyError
    If a modality, layer, or column is not there; the message lists what is.
ValueError
    Before training: if values are not counts, cells are empty, names repeat, copies of a column disagree, there is
    nothing to learn from, or a combination is not built.
FloatingPointError
    If the loss becomes non-finite and stays so after several retries at lower rates."""


def documented(function: Callable) -> Callable:
    """Fill the shared texts into the docstring of a fit, without its indentation, which Python 3.13 takes off."""
    name, preset = function.__name__, PRESETS[function.__name__]
    values = {"name": name, "n_latent": preset["n_latent"], "likelihood": preset["gene_likelihood"]}
    values["normal"] = ', "normal"' if name == "scvi" else ""
    values["label_dispersion"] = '"gene-label", ' if name.endswith("anvi") else ""
    texts = {"data": DATA, "rna_data": RNA_DATA, "labels": LABELS, "panels": PANELS, "rna_mod": RNA_MOD, "mods": MODS}
    function.__doc__ = inspect.cleandoc(function.__doc__)
    for slot, text in (texts | {"fit": FIT.format(**values), "raises": RAISES}).items():
        function.__doc__ = function.__doc__.replace("{" + slot + "}", text)
    return function


@documented
@on_file_together
def scanvi(
    data: Data,
    labels_key: str | list[str] | None = "cell_type",
    *,
    label_tree: dict[str, list[str]] | None = None,
    unlabeled_category: str | int = "Unknown",
    init: str | Model | None = None,
    train: Literal["all", "label_nets"] = "all",
    classification_ratio: float = 50.0,
    label_prior: Literal["uniform", "empirical", "learned"] = "uniform",
    linear_classifier: bool = False,
    rna_mod: str = "rna",
    batch_key: str | None = None,
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    categorical_covariate_keys: list[str] | None = None,
    continuous_covariate_keys: list[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    gene_likelihood: GeneLikelihood | None = None,
    dispersion: Dispersion | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    max_minutes: float | None = None,
    stream: bool | None = None,
    callback: Callback | None = None,
    **model_kwargs: Unpack[Options],
) -> Data | None:
    """Fit scANVI: RNA counts and partly known cell types; predict the type of every cell.

    Parameters
    ----------
    {rna_data}
    {labels}
    {rna_mod}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `mdata['rna']` (obs repeated in
    `mdata.obs` as `rna:...`) or the AnnData.

    `obsm['X_scanvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['scanvi_prediction']` : categorical
        Most probable cell type of every cell.
    `obs['scanvi_confidence']` : float32
        Its probability, calibrated on validation cells.
    `obs['scanvi_margin']`, `obs['scanvi_entropy']`, `obs['scanvi_novelty']` : float32
        Lead over the second class; entropy of all probabilities (0 to 1); distance to labelled cells (1 is far).
    `obs['scanvi_label']` : categorical
        The cell's own label where it has one; else "Unassigned" where its novelty is above 1, else the prediction.
        With several levels: the name at the finest level at which the novelty is not above 1.
    `obs['scanvi_prediction_{level}']`, `obs['scanvi_confidence_{level}']`, `obs['scanvi_novelty_{level}']`
        The same of coarser levels, where `labels_key` or `label_tree` gives several.
    `obsm['scanvi_proba']` : DataFrame (cells, classes)
        All class probabilities.
    `uns['scanvi_prediction_colors']`, `uns['scanvi_label_colors']` : list of str
        The labels' colours, where they have any.
    `obs['scanvi_split']` : categorical
        "train" or "validation".
    `uns['scanvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: Xu et al., Molecular Systems Biology 2021; the objective conditions a labelled cell on its own label.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scanvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata["rna"].obsm["X_scanvi"].shape
    (300, 10)
    """
    return run_fit("scanvi", **locals())


@documented
@on_file_together
def scvi(
    data: Data,
    *,
    rna_mod: str = "rna",
    batch_key: str | None = None,
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    categorical_covariate_keys: list[str] | None = None,
    continuous_covariate_keys: list[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    gene_likelihood: GeneLikelihood | None = None,
    dispersion: Dispersion | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    max_minutes: float | None = None,
    stream: bool | None = None,
    callback: Callback | None = None,
    **model_kwargs: Unpack[Options],
) -> Data | None:
    """Fit scVI: a latent space of RNA counts, corrected for batches.

    Parameters
    ----------
    {rna_data}
    {rna_mod}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `mdata['rna']` (obs repeated in
    `mdata.obs` as `rna:...`) or the AnnData.

    `obsm['X_scvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['scvi_split']` : categorical
        "train" or "validation".
    `uns['scvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: Lopez et al., Nature Methods 2018.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.scvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata["rna"].obsm["X_scvi"].shape
    (300, 10)
    """
    return run_fit("scvi", **locals())


@documented
@on_file_together
def totalanvi(
    data: Data,
    labels_key: str | list[str] | None = "cell_type",
    *,
    label_tree: dict[str, list[str]] | None = None,
    unlabeled_category: str | int = "Unknown",
    panel_key: str | None = None,
    missing: Literal["auto", "nan"] = "auto",
    init: str | Model | None = None,
    train: Literal["all", "label_nets"] = "all",
    classification_ratio: float = 50.0,
    label_prior: Literal["uniform", "empirical", "learned"] = "uniform",
    linear_classifier: bool = False,
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    prot_obsm: str | None = None,
    proteins: Antibodies = "all",
    batch_key: str | None = None,
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    categorical_covariate_keys: list[str] | None = None,
    continuous_covariate_keys: list[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    gene_likelihood: GeneLikelihood | None = None,
    dispersion: Dispersion | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    max_minutes: float | None = None,
    stream: bool | None = None,
    callback: Callback | None = None,
    **model_kwargs: Unpack[Options],
) -> Data | None:
    """Fit TotalANVI: RNA and protein counts and partly known cell types; predict the type of every cell.

    Cells without proteins, with another panel, or with NaN in place of a protein all take part; what was not
    measured is masked in input and likelihood alike.

    Parameters
    ----------
    {data}
    {labels}
    {panels}
    {mods}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `data`.

    `obsm['X_totalanvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['totalanvi_prediction']` : categorical
        Most probable cell type of every cell.
    `obs['totalanvi_confidence']` : float32
        Its probability, calibrated on validation cells.
    `obs['totalanvi_margin']`, `obs['totalanvi_entropy']`, `obs['totalanvi_novelty']` : float32
        Lead over the second class; entropy of all probabilities (0 to 1); distance to labelled cells (1 is far).
    `obs['totalanvi_label']` : categorical
        The cell's own label where it has one; else "Unassigned" where its novelty is above 1, else the prediction.
        With several levels: the name at the finest level at which the novelty is not above 1.
    `obs['totalanvi_prediction_{level}']`, `obs['totalanvi_confidence_{level}']`, `obs['totalanvi_novelty_{level}']`
        The same of coarser levels, where `labels_key` or `label_tree` gives several.
    `obsm['totalanvi_proba']` : table (cells, classes)
        All class probabilities.
    `uns['totalanvi_prediction_colors']`, `uns['totalanvi_label_colors']` : list of str
        The labels' colours, where they have any.
    `obs['totalanvi_split']` : categorical
        "train" or "validation".
    `uns['totalanvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: the TotalANVI model, totalVI's decoder under scANVI's latent hierarchy; the objective conditions a labelled
    cell on its own label.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata.obsm["X_totalanvi"].shape
    (300, 20)
    """
    return run_fit("totalanvi", **locals())


@documented
@on_file_together
def totalvi(
    data: Data,
    *,
    panel_key: str | None = None,
    missing: Literal["auto", "nan"] = "auto",
    rna_mod: str = "rna",
    prot_mod: str = "prot",
    prot_obsm: str | None = None,
    proteins: Antibodies = "all",
    batch_key: str | None = None,
    layer: str | dict[str, str] | None = None,
    genes: Genes = "auto",
    categorical_covariate_keys: list[str] | None = None,
    continuous_covariate_keys: list[str] | None = None,
    size_factor_key: str | None = None,
    n_latent: int | None = None,
    gene_likelihood: GeneLikelihood | None = None,
    dispersion: Dispersion | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    max_minutes: float | None = None,
    stream: bool | None = None,
    callback: Callback | None = None,
    **model_kwargs: Unpack[Options],
) -> Data | None:
    """Fit totalVI: a joint latent space of RNA and protein counts, with protein background told from foreground.

    Parameters
    ----------
    {data}
    {panels}
    {mods}
    {fit}

    Returns
    -------
    Depending on `copy`, returns or updates `data` with the following fields, in `data`.

    `obsm['X_totalvi' | 'X_' + key_added]` : float32 array (cells, n_latent)
        Posterior mean of the latent space.
    `obs['totalvi_split']` : categorical
        "train" or "validation".
    `uns['totalvi']` : dict
        `params`, `classes`, `features`, `batches`, `panels`, `history` (one row per epoch, nats per cell) and `model`
        (JSON and safetensors bytes), from which every other verb works.

    Raises
    ------
    {raises}

    Notes
    -----
    Source: Gayoso et al., Nature Methods 2021.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalvi(mdata, batch_key="batch", max_epochs=2)
    >>> mdata.obsm["X_totalvi"].shape
    (300, 20)
    """
    return run_fit("totalvi", **locals())
