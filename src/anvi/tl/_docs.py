"""Parameter texts that the four fits share, put into their docstrings by one decorator."""

from collections.abc import Callable

DATA = """data
    MuData with RNA counts in `mdata['rna']` and protein counts in `mdata['prot']`; cells without proteins, NaN
    proteins and partial panels are welcome. Or an AnnData with RNA counts, and proteins in `obsm[prot_obsm]`."""

RNA_DATA = """data
    AnnData with RNA counts, or a MuData that holds them in `mdata['rna']`."""

LABELS = """labels_key
    Column with cell types, found in `mdata.obs` or a modality's obs (`"rna:cell_type"` is explicit).
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
    `uns[f"{{prot_obsm}}_names"]`."""

FIT = """batch_key
    Column with the batch of each cell, found in `mdata.obs` or a modality's obs; None for one batch.
layer
    Layer with raw counts; a dict gives one per modality; None takes `.X`.
categorical_covariate_keys, continuous_covariate_keys
    Lists of further columns to correct for; continuous ones are used as they are.
size_factor_key
    Column with the size factor of each cell, in place of its library size.
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


def documented(**values: str) -> Callable:
    """Fill the shared texts, themselves filled with `values`, into a docstring; indented as the docstring is."""

    def fill(function: Callable) -> Callable:
        texts = {
            "data": DATA,
            "rna_data": RNA_DATA,
            "labels": LABELS,
            "panels": PANELS,
            "rna_mod": RNA_MOD,
            "mods": MODS.replace("{{", "{").replace("}}", "}"),
            "fit": FIT.format(**values) if values else FIT,
            "raises": RAISES,
        }
        for name, text in texts.items():
            function.__doc__ = function.__doc__.replace("{" + name + "}", text.replace("\n", "\n    "))
        return function

    return fill
