"""What questions to a fitted model are tested with: its decoder by hand, and a fit that is good enough to be scored."""

import functools
from dataclasses import dataclass

import numpy as np
import reference
from helpers import cite
from mudata import MuData
from networks import Naive, array

import anvi as av
from anvi._model import Model
from anvi.nn import Batch


@dataclass(frozen=True)
class ByHand:
    """What the decoder says of one cell, in float64 and by loops."""

    share: np.ndarray  # (genes,)
    theta: np.ndarray  # (genes,)
    zero: np.ndarray | None  # (genes,) probability of an extra zero
    library: float
    back_mean: np.ndarray | None = None  # (proteins,) of log background
    back_sd: np.ndarray | None = None
    factor: np.ndarray | None = None
    background: np.ndarray | None = None  # (proteins,) probability
    phi: np.ndarray | None = None

    def protein(self, include_background: bool) -> np.ndarray:
        """Expected count, the background being log-normal."""
        beta = np.exp(self.back_mean + self.back_sd**2 / 2)
        value = (1 - self.background) * beta * self.factor
        return value + self.background * beta if include_background else value


def by_hand(model: Model, batch: Batch, n: int, code: int | None = None) -> ByHand:
    """Encode cell `n` of a minibatch in its own batch and decode the posterior mean, there or in batch `code`."""
    naive, config, weights = Naive(model.network), model.config, model.weights()
    one_hot = np.zeros(config.n_covariate_rows)
    if batch.codes is not None:
        one_hot[batch.codes[n].numpy()] = 1
    x = array(batch.x[n])
    features = [np.log1p(x)]
    if config.has_protein:
        y, measured = array(batch.y[n]), batch.measured[n].numpy()
        features = [np.log1p(x / (1 + x.mean())), reference.protein_input(y[None], measured[None])[0]]
    z, _ = naive.gaussian("encoder", np.concatenate(features), one_hot, "encoder", 1e-4)
    library = float(np.exp(array(batch.log_library[n, 0])))
    if config.library == "latent":
        m, v = naive.gaussian("library_encoder", np.concatenate(features), one_hot, "encoder", 1e-4)
        library = float(np.exp(m + v / 2)[0])
    own = int(batch.batch[n]) if code is None else code
    if code is not None and config.n_batches > 1:
        one_hot[: config.n_batches] = np.arange(config.n_batches) == code
    h = naive.stack("rna.trunk", z, one_hot, "decoder")
    h = np.concatenate([h, z]) if config.has_protein else h
    mixing = h
    if config.has_protein:
        mixing = np.concatenate([naive.stack("protein.mixing_trunk", z, one_hot, "decoder"), z])
    share = reference.softmax(naive.linear("rna.scale", h, one_hot))
    zero = None
    if config.gene_likelihood == "zinb":
        zero = 1 / (1 + np.exp(-naive.linear("rna.zero", mixing, one_hot)))
    found = ByHand(share, naive.theta(h, one_hot, own, int(batch.label[n])), zero, library)
    if not config.has_protein:
        return found
    back, fore = (
        np.concatenate([naive.stack(f"protein.{part}_trunk", z, one_hot, "decoder"), z]) for part in ("back", "fore")
    )
    phi = np.exp(array(weights["protein.log_phi"]))
    return ByHand(
        *(found.share, found.theta, found.zero, found.library),
        back_mean=naive.linear("protein.back_mean", back, one_hot),
        back_sd=np.log1p(np.exp(naive.linear("protein.back_scale", back, one_hot))) + 1e-8,
        factor=np.maximum(naive.linear("protein.fore", fore, one_hot), 0) + 1 + 1e-8,
        background=1 / (1 + np.exp(-naive.linear("protein.mixing", mixing, one_hot))),
        phi=phi[own if config.protein_dispersion == "protein-batch" else 0],
    )


@functools.cache
def _well_fitted() -> MuData:
    mdata = cite(600)
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        av.tl.totalvi(mdata, batch_key="batch", panel_key="panel", max_epochs=150)
    return mdata


def well_fitted() -> MuData:
    """totalVI on 600 cells, 60 genes and 20 proteins with known truth, trained for 150 epochs; a copy."""
    return _well_fitted().copy()
