"""What the network is told and fed: its configuration, the four published models as constants, a minibatch."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor


class Entries(NamedTuple):
    """The non-zero counts of a minibatch, where they are and what; zeros among them do no harm."""

    row: Tensor  # (entries,) int64
    column: Tensor  # (entries,) int64
    count: Tensor  # type: ignore[assignment]  # (entries,) float

    @classmethod
    def of(cls, x: Tensor) -> "Entries":
        """Found in a dense matrix; this waits for the device, so minibatches bring their own."""
        row, column = x.nonzero(as_tuple=True)
        return cls(row, column, x[row, column])

    def dense(self, like: Tensor) -> Tensor:
        """The matrix `(cells, genes)` that they are the counts of."""
        return torch.zeros_like(like).index_put_((self.row, self.column), self.count, accumulate=True)


class Batch(NamedTuple):
    """A minibatch. Cells of weight 0 are padding: they count in nothing but the batch-norm statistics."""

    x: Tensor | None  # (cells, genes) raw RNA counts; None where `entries` say it all
    y: Tensor | None  # (cells, proteins) raw protein counts, 0 where not measured
    measured: Tensor | None  # (cells, proteins) bool
    batch: Tensor  # (cells,) batch codes
    panel: Tensor | None  # (cells,) panel codes, the rows of the background prior
    codes: Tensor | None  # (cells, covariates) rows of the covariate table: batch first, then the others
    continuous: Tensor | None  # (cells, continuous covariates) as the user gave them
    log_library: Tensor  # (cells, 1) log of the summed RNA counts, or of the size factor; imputed without RNA
    label: Tensor  # (cells,) class codes, -1 for unlabelled
    weight: Tensor  # (cells,) 1, or 0 for padding
    n_labelled: int = 0  # the first so many cells are labelled; the same in every minibatch of a fit
    entries: Entries | None = None  # the non-zero counts of x; None: to be looked for
    shown: Tensor | None = None  # (cells, proteins) bool, of the measured ones those that the encoder sees; None: all
    seen: Entries | None = None  # the counts that the encoder sees; None: all
    allowed: Tensor | None = None  # (cells, classes) bool, what labels leave open; None: one class or all
    has_rna: Tensor | None = None  # (cells,) bool, whether RNA was measured; None: in every cell

    def counted(self, entries: Entries) -> Entries:
        """Entries with whatever stands in place of RNA that was not measured as zeros."""
        if self.has_rna is None:
            return entries
        return entries._replace(count=torch.where(self.has_rna[entries.row], entries.count, 0.0))


GeneLikelihood = Literal["nb", "zinb", "poisson", "normal"]
Dispersion = Literal["gene", "gene-batch", "gene-label", "gene-cell"]
ProteinDispersion = Literal["protein", "protein-batch"]
Norm = Literal["encoder", "decoder", "none", "both"]

_MANY = 10_000_000
# least and most: beyond these a network is a slip of the pen, or a file that wants the machine's memory
_SIZES = {
    "n_genes": (1, _MANY),
    "n_proteins": (0, _MANY),
    "n_labels": (0, _MANY),
    "n_batches": (1, _MANY),
    "n_panels": (1, _MANY),
    "n_categories": (1, _MANY),
    "n_continuous": (0, _MANY),
    "n_dispersion_labels": (0, _MANY),
    "n_hidden": (1, 100_000),
    "n_latent": (1, 100_000),
    "n_layers_encoder": (1, 100),
    "n_layers_decoder": (1, 100),
}
MAX_COVARIATES = 1_000


@dataclass(frozen=True)
class Config:
    """Everything that decides the network's shape and its mathematics; JSON-able.

    The sizes come from the data, the options from one of the presets and the user. Source: spec section 1.
    """

    # sizes
    n_genes: int
    n_proteins: int = 0
    n_labels: int = 0
    n_batches: int = 1
    n_panels: int = 1
    n_categories: tuple[int, ...] = ()
    n_continuous: int = 0
    # options
    n_hidden: int = 128
    n_latent: int = 10
    n_layers_encoder: int = 1
    n_layers_decoder: int = 1
    dropout_encoder: float = 0.1
    dropout_decoder: float = 0.0
    dropout_u: float = 0.1
    gene_likelihood: GeneLikelihood = "zinb"
    dispersion: Dispersion = "gene"
    protein_dispersion: ProteinDispersion = "protein"
    library: Literal["observed", "latent", "size_factor"] = "observed"
    latent_distribution: Literal["normal", "ln"] = "normal"
    log_variational: bool = True
    use_batch_norm: Norm = "both"
    use_layer_norm: Norm = "none"
    encode_covariates: bool = True
    deeply_inject_covariates: bool = True
    linear_classifier: bool = False
    label_prior: Literal["uniform", "empirical", "learned"] = "uniform"
    objective: Literal["bound", "scvi-tools"] = "bound"
    # kept for models of the incumbent
    n_dispersion_labels: int = 0  # categories of dispersion="gene-label" in a model that has labels for nothing else
    efficiency: bool = False
    background_scale: Literal["softplus", "exp"] = "softplus"
    classifier_softmax: bool = False  # its cross-entropy takes probabilities for logits, as before scvi-tools 1.1

    @property
    def has_protein(self) -> bool:
        """Whether proteins are modelled."""
        return self.n_proteins > 0

    @property
    def has_labels(self) -> bool:
        """Whether labels are modelled."""
        return self.n_labels > 0

    @property
    def covariate_sizes(self) -> tuple[int, ...]:
        """Category counts of the injected covariates, batch first; those with a single category inject nothing."""
        return tuple(size for size in (self.n_batches, *self.n_categories) if size > 1)

    @property
    def n_covariate_rows(self) -> int:
        """Rows of each covariate table."""
        return sum(self.covariate_sizes)

    @property
    def prior_floor(self) -> float:
        """Smallest variance of p(z|u,c); the incumbent has none."""
        return 0.0 if self.objective == "scvi-tools" else 1e-4

    @property
    def eps(self) -> float:
        """What is added to a mean inside a logarithm; nothing, except to follow the incumbent to the digit."""
        return 1e-8 if self.objective == "scvi-tools" else 0.0

    def norm_of(self, side: Literal["encoder", "decoder"], kind: Literal["batch", "layer"]) -> bool:
        """Whether the encoder or decoder side uses a batch or a layer norm."""
        return (self.use_batch_norm if kind == "batch" else self.use_layer_norm) in (side, "both")

    def checked(self) -> "Config":
        """Return the configuration, or raise a ValueError that names what cannot be combined."""
        config = self
        if config.gene_likelihood == "negative_binomial":  # the papers' spelling
            config = replace(config, gene_likelihood="nb")
        for field in fields(config):
            value = getattr(config, field.name)
            if isinstance(field.default, str) and value not in get_args(field.type):
                choices = ", ".join(map(repr, get_args(field.type)))
                raise ValueError(f"{field.name}='{value}' is not one of {choices}.")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name}={value!r} must be True or False.")
        for name, (least, most) in _SIZES.items():
            for value in getattr(config, name) if name == "n_categories" else (getattr(config, name),):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(f"{name}={value!r} must be a whole number.")
                if value < least:
                    raise ValueError(f"{name}={value} must be at least {least}.")
                if value > most:
                    raise ValueError(f"{name}={value} must be at most {most:,}.")
        if len(config.n_categories) > MAX_COVARIATES:
            raise ValueError(f"n_categories has {len(config.n_categories)} entries; at most {MAX_COVARIATES} can be.")
        for name in ("dropout_encoder", "dropout_decoder", "dropout_u"):
            value = getattr(config, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be a number.")
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be at least 0 and below 1.")
        for why in config._refusals():
            raise ValueError(f"This combination is not built: {why}")
        return config

    def _refusals(self) -> Iterator[str]:
        """What is chosen together and not built."""
        semi = self.has_labels
        if semi and self.latent_distribution == "ln":
            yield "latent_distribution='ln' with labels (scanvi, totalanvi). Use latent_distribution='normal'."
        if self.gene_likelihood == "normal" and (semi or self.has_protein):
            yield "gene_likelihood='normal' outside scvi. Use 'nb', 'zinb' or 'poisson'."
        if self.gene_likelihood == "normal" and self.dispersion == "gene-cell":
            yield "gene_likelihood='normal' with dispersion='gene-cell'. Use dispersion='gene'."
        if self.dispersion == "gene-label" and not semi and not self.n_dispersion_labels:
            yield "dispersion='gene-label' without labels (scvi, totalvi). Use 'gene', 'gene-batch' or 'gene-cell'."
        if self.objective == "scvi-tools" and self.dispersion == "gene-label" and semi:
            yield (
                "dispersion='gene-label' with labels and objective='scvi-tools', which crashes there. "
                "Use objective='bound'."
            )
        if self.has_protein and not self.deeply_inject_covariates:
            yield "deeply_inject_covariates=False with proteins (totalvi, totalanvi). Leave it True."
        if self.has_protein and not self.log_variational:
            yield "log_variational=False with proteins (totalvi, totalanvi). Leave it True."

    def to_dict(self) -> dict:
        """As a dict that JSON can hold."""
        return asdict(self) | {"n_categories": list(self.n_categories)}

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Back from :meth:`to_dict`; an unknown or missing name is an error that says which."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"The model's configuration has unknown entries {unknown}: was it made by a newer anvi?")
        if "n_genes" not in values:
            raise ValueError("The model's configuration lacks 'n_genes': the file is incomplete.")
        return cls(**values | {"n_categories": tuple(values.get("n_categories", ()))}).checked()


# The published architectures. encode_covariates is on in all four: a model without it cannot be mapped onto later.
SCVI = {
    "n_hidden": 128,
    "n_latent": 10,
    "n_layers_encoder": 1,
    "n_layers_decoder": 1,
    "dropout_encoder": 0.1,
    "dropout_decoder": 0.0,
    "dropout_u": 0.1,
    "gene_likelihood": "zinb",
}
SCANVI = SCVI
TOTALVI = {
    "n_hidden": 256,
    "n_latent": 20,
    "n_layers_encoder": 2,
    "n_layers_decoder": 1,
    "dropout_encoder": 0.2,
    "dropout_decoder": 0.2,
    "dropout_u": 0.05,
    "gene_likelihood": "nb",
}
TOTALANVI = TOTALVI
PRESETS = {"scvi": SCVI, "scanvi": SCANVI, "totalvi": TOTALVI, "totalanvi": TOTALANVI}
