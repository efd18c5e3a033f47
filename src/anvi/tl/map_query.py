"""tl.map_query."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from anvi._arguments import RandomState, seed_of
from anvi._backed import on_file
from anvi._data import slots
from anvi._data.batches import split
from anvi._data.cells import Cells, read_cells, with_library
from anvi._data.containers import Data, Source
from anvi._data.fits import check_free, check_no_own, odd_cells, stored_fits
from anvi._data.labels import known_labels
from anvi._data.predictions import colors_of
from anvi._data.query import Query, check_min_genes, find_query, relocated
from anvi._data.setup import Setup
from anvi._find import find_reference
from anvi._fit import surgery
from anvi._fit.loop import fit, generator, seeds
from anvi._fit.plan import Plan
from anvi._fit.start import set_library_prior
from anvi._model import Model
from anvi._posterior import encode, imputation
from anvi._runtime import give_back_memory, made_current, verb
from anvi.nn import VAE
from anvi.settings import choose_device

from ._ask import tell_cells_without_rna
from ._fit import held_at_most, info_of, write_fit

logger = logging.getLogger("anvi")

STEPS = {"reference": 1_000, "none": 2_000}
"""Length of a mapping, in minibatches, unless `max_epochs` says otherwise; by what is frozen."""
RATES = {"reference": 1e-2, "none": 4e-3}
"""Learning rates; a few rows bear a higher one than a whole network."""
WEIGHTS = ("max_kl_weight", "protein_weight", "classification_ratio", "label_smoothing")
"""Options that weigh the terms of the loss: a mapping minimises what the reference's fit did."""


@verb
@on_file
def map_query(
    query: Data,
    reference: Data | str | Path | Model,
    *,
    model: str | None = None,
    max_epochs: int | None = None,
    freeze: Literal["reference", "none"] = "reference",
    batch_key: str | None = None,
    panel_key: str | None = None,
    labels_key: str | list[str] | None = None,
    gene_key: str | None = None,
    min_genes: float = 0.5,
    layer: str | dict[str, str] | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    train_size: float = 0.9,
    early_stopping: bool = True,
    stream: bool | None = None,
    rna_mod: str | None = None,
    prot_mod: str | None = None,
    prot_obsm: str | None = None,
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
) -> Data | None:
    """Map new cells onto a fitted model: its latent space and its classes, with batches that it has not seen.

    The network gets a row per new batch, panel and category in every layer, and only these rows are trained, on the
    query alone. All that the reference has learnt stays as it is, bit for bit, so that its own cells stay where they
    are.

    Parameters
    ----------
    query
        MuData or AnnData with raw counts, or its file. Its genes may be more or fewer, in any order: those it lacks are
        masked. Proteins that it lacks, and a whole protein modality that it lacks, are not measured; proteins that the
        reference does not know are ignored. Labels are not needed.
    reference
        A fitted object, a `.h5mu`, `.h5ad` or `.zarr` file with one, a folder that `write_model` made, the "owner/name"
        of a model on the hub (its newest revision; `av.io.from_hub` takes others), or a :class:`~anvi.Model`. It is
        not changed.
    model
        Key of the model in the reference; None: the only one there.
    max_epochs
        Longest run; None: about 1,000 steps (2,000 without freezing), between 5 and 100 epochs. 0 trains nothing: a
        new batch is then taken for the average of the reference's.
    freeze
        "reference" trains the new rows alone; "none" trains the whole network on the query, which then forgets the
        reference.
    batch_key, panel_key
        Columns of the query with batch and panel; None: those of the reference. A value that the reference knows is
        the same batch. Cells without a value, or all cells if there is no such column, are a batch called "query".
    labels_key
        Column of the query with labels that may guide the mapping, or several, coarse to fine; None: labels are not
        looked at. Where the reference's labels have several levels, so may these, a coarse name leaving its classes
        open. Labels that are no name of the reference are taken as unlabelled, with one warning.
    gene_key
        Column of var with the names of the genes, as the reference has them; None: `var_names`. Where both sides have
        Ensembl ids, versions do not matter, nor do prefixes (`"GRCh38_"`).
    min_genes
        Least share of the reference's genes that the query must have.
    layer
        Layer with raw counts; a dict gives one per modality; None: that of the reference if the query has it, else
        `.X`.
    batch_size, train_size, early_stopping, stream
        As in the fits.
    lr
        First learning rate; None: 0.01, or as in the fits without freezing.
    rna_mod, prot_mod, prot_obsm
        Where RNA and proteins are in the query; None: where they were in the reference.
    device
        "auto" or a torch device.
    random_state
        Seed of everything random in this call.
    key_added
        Prefix of the slots; default: that of the reference.
    copy
        Return a new object instead of writing into `query`.

    Returns
    -------
    Depending on `copy`, returns or updates `query` with the following fields, in the places in which a fit of the same
    model writes them.

    `obsm['X_{key}']` : float32 array (cells, n_latent)
        Posterior mean, in the latent space of the reference.
    `obs['{key}_prediction']`, `obs['{key}_confidence']`, `obsm['{key}_proba']`
        Classes of the reference and their probabilities, where it has labels.
    `obs['{key}_label']` : categorical
        What `labels_key` says of the cell, a class of the reference or not; the prediction where it says nothing. With
        labels at several levels as in `tl.predict`, which tells of the columns of coarser levels, too.
    `uns['{key}_prediction_colors']`, `uns['{key}_label_colors']` : list of str
        Those of the reference, where the object has any.
    `obs['{key}_split']` : categorical
        "train" or "validation", unless nothing was trained.
    `obs['{key}_batch']`, `obs['{key}_panel']`, `obs['{key}_covariate_{name}']` : categorical
        What the cells were taken for; only where the query has no such column or it is incomplete.
    `uns['{key}']` : dict
        As of a fit; the model is the widened one, for the genes that both have, and answers every other verb. And
        `reference`: its `name`, `key`, `n_cells`, the fingerprint of its weights (`sha256`), `freeze`, `new_batches`,
        the percentages `genes_matched` and `proteins_matched`, and lists of names: `genes` (as the reference calls
        those of the model), `missing_genes`, `missing_proteins`, `ignored_proteins`.

    Raises
    ------
    FileNotFoundError
        If the reference is neither file nor folder nor a model of the hub.
    KeyError, ValueError
        Before training: if too few genes match (the message shows both sides and a way out), no protein matches, a
        column that was named is missing, values are not counts, or the slots hold a fit of the query's own or a column
        of the user's.
    FloatingPointError
        If the loss becomes non-finite and stays so after several retries at lower rates.

    Notes
    -----
    Batch norms keep the reference's statistics and dropout is off, so training and validation losses are of one kind.
    Source: Lotfollahi et al., Nature Biotechnology 2022.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(400, n_genes=60)
    >>> query = mdata[mdata.obs["batch"] == "batch_1"].copy()
    >>> mdata = mdata[mdata.obs["batch"] != "batch_1"].copy()
    >>> av.tl.totalanvi(mdata, batch_key="batch", max_epochs=2)
    >>> av.tl.map_query(query, mdata, max_epochs=2)
    >>> list(query.uns["totalanvi"]["reference"]["new_batches"])
    ['batch_1']
    """
    plan = _plan(max_epochs, batch_size, RATES[freeze] if lr is None else lr, train_size, early_stopping)
    check_min_genes(min_genes)
    opened = Source(query)
    source, holder = find_reference(reference, model)
    plan = replace(plan, **_kept(source.info, *WEIGHTS))
    key = slots.clean_key(source.key if key_added is None else key_added)
    setup = relocated(source.setup, opened, layer, rna_mod=rna_mod, prot_mod=prot_mod, prot_obsm=prot_obsm)
    check_free(opened, key, joint=setup.joint, rna_mod=setup.rna_mod)
    check_no_own(opened, setup, key)
    there = stored_fits(opened, whole=True)
    if key in there and "reference" not in there[key].home.uns[key]:  # else an earlier mapping is replaced
        raise ValueError(f"The query has a fit of its own under '{key}'; pass key_added= to map it beside that.")
    if labels_key is not None and not source.config.has_labels:
        raise ValueError(f"labels_key='{labels_key}' is of no use: the reference ({source.name}) has no labels.")
    where_to, seed = made_current(choose_device(device)), seed_of(random_state)
    tell_cells_without_rna(source, opened, setup)
    found = find_query(
        opened,
        setup,
        key,
        batch_key=batch_key,
        panel_key=panel_key,
        labels_key=labels_key,
        gene_key=gene_key,
        min_genes=min_genes,
    )
    own = [slot for slot in found.columns if slot in slots.home(query, setup).obs]
    if own and key not in there:
        raise ValueError(f"obs['{own[0]}'] would be overwritten, and it is no result of anvi; pass key_added=.")
    # read the query as the reference's fit was, and widen the network by what is new
    opened = Source(query, found.columns)
    cells = read_cells(opened, found.setup, labels=labels_key is not None, most=held_at_most(stream, where_to))
    for told in odd_cells(opened, found.setup):
        logger.warning(told)
    found = found._replace(setup=with_library(found.setup, cells))
    known = known_labels(opened, found.setup, pd.Index(cells.names)) if source.config.has_labels else None
    network, tables = _widened(source, found, cells)
    # train, and place the cells
    on_device = cells.to(where_to)
    network, history, trained, validation = _train(network, tables, on_device, plan, seed, freeze)
    facts = {
        "name": source.name,
        "key": source.key,
        "n_cells": int(source.info.get("n_cells", 0)),
        "sha256": source.fingerprint(),
        "freeze": freeze,
    }
    info = {"key": key} | trained | {"reference": facts} | _kept(source.info, "hide_rna")
    imputing = imputation.widened(source.imputation, found.genes, cells, network.config.n_batches)
    # a network that is trained as a whole no longer puts cells where those of the reference lie
    still = freeze == "reference"
    if still or source.neighbors is None:  # else it is the temperature of a mean with neighbours that are no more
        info |= _kept(source.info, "temperature")
    info["n_neighbors"] = source.info.get("n_neighbors") if still else 0
    landmarks = source.landmarks
    if not still and landmarks is not None:  # nor may it promise what held-out cells said of them
        landmarks = landmarks._replace(own=None, sure=None)
    parts = (landmarks, imputing, source.neighbors if still else None)
    mapped = Model(source.name, found.setup, network, history, info, *parts)
    imputing = imputation.told_by_query(mapped.on(where_to), on_device)
    mapped = replace(mapped, imputation=imputing)
    on_device.x.let_go()
    give_back_memory()
    embedding = encode.embed(mapped.on(where_to), on_device)
    # write
    query = slots.own(query, copy)
    write_fit(
        query,
        key,
        mapped,
        cells,
        embedding,
        validation,
        known=known,
        colors=_colors(holder, source, opened, found.setup),
        columns=found.columns,
        reference=facts | found.report,
    )
    return query if copy else None


def _kept(info: dict, *names: str) -> dict:
    """Facts of the reference that hold for what is mapped onto it."""
    return {name: info[name] for name in names if name in info}


def _plan(max_epochs: int | None, batch_size: int, lr: float, train_size: float, early_stopping: bool) -> Plan:
    """Options of the fit, checked; 0 epochs are allowed here and nowhere else."""
    plan = Plan(
        max_epochs=max_epochs,
        batch_size=batch_size,
        lr=lr,
        train_size=train_size,
        early_stopping=early_stopping,
        adversary=False,
        hide_proteins=0.0,
        hide_rna=0.0,
    )
    replace(plan, max_epochs=max_epochs or None).for_cells(2, warm_start=True)
    return plan


def _widened(source: Model, found: Query, cells: Cells) -> tuple[VAE, tuple[surgery.Table, ...]]:
    """The reference's network for the genes that both have, with rows for what is new in the query."""
    setup = found.setup
    network = surgery.narrow(source.network, torch.from_numpy(found.genes))
    config = replace(network.config, **{name: setup.sizes[name] for name in ("n_batches", "n_categories", "n_panels")})
    measured = torch.tensor(source.setup.measured, dtype=torch.bool) if setup.joint else None
    network, tables = surgery.widen(network, config, measured)
    if network.library_encoder is not None:
        set_library_prior(network, cells, source.config.n_batches)
    if tables and not config.encode_covariates:
        logger.info(
            "the reference was fitted with encode_covariates=False: its encoder does not see batches, so latent space "
            "and predictions are those of the reference as it is; only the decoder learns the new ones"
        )
    return network, tables


def _train(
    network: VAE, tables: tuple[surgery.Table, ...], cells: Cells, plan: Plan, seed: int, freeze: str
) -> tuple[VAE, pd.DataFrame, dict, np.ndarray | None]:
    """Train new rows, or everything, on the cells, which are on the device.

    Returns the network on the CPU, its history, facts, and positions of validation cells; None if nothing was trained.
    """
    split_seed, fit_seed = seeds(seed, 2)
    begun, device = time.monotonic(), cells.label.device
    train, validation = split(cells, plan.train_size, generator(split_seed))
    idle = plan.max_epochs == 0 or len(train) < 2
    if freeze == "reference" and not tables:
        logger.info("the reference knows all batches and categories: nothing to train")
        idle = True
    if idle:
        plan, train, validation = replace(plan, max_epochs=0), train[:0], None
        history = pd.DataFrame({"epoch": np.zeros(0, dtype=np.int64)})
    else:
        if plan.max_epochs is None:
            per_epoch = math.ceil(len(train) / plan.batch_size)
            plan = replace(plan, max_epochs=min(100, max(5, math.ceil(STEPS[freeze] / per_epoch))))
        plan = plan.for_cells(len(train), warm_start=True)
        if freeze == "reference":
            network, history = surgery.train_new_rows(network, tables, cells, train, validation, plan, fit_seed)
        else:
            history = fit(network.to(device), cells, train, validation, plan, random_state=fit_seed)
    info = info_of(cells, plan, seed, history, time.monotonic() - begun, train, device)
    return network.cpu(), history, info, None if validation is None else validation.cpu().numpy()


def _colors(holder: Data | None, reference: Model, query: Source, setup: Setup) -> list[str] | None:
    """The reference's colours of its classes, or else those of the query's labels, where there are any."""
    if not reference.config.has_labels:
        return None
    colors = None
    if holder is not None:
        colors = slots.home(holder, reference.setup).uns.get(f"{slots.prediction(reference.key)}_colors")
    if colors is None and setup.labels_key is not None:
        return colors_of(query, setup.labels_key, setup.classes)
    return None if colors is None else list(map(str, colors))
