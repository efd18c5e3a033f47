"""What the four fits have in common: read, check, train, write. The verbs beside this file only name the model."""

import hashlib
import inspect
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import pandas as pd
import torch

from anvi._arguments import RandomState, check_argument, seed_of
from anvi._data import slots
from anvi._data.antibodies import split_targets
from anvi._data.batches import split
from anvi._data.cells import Cells, read_cells, remarks, with_library
from anvi._data.containers import Data, Source, did_you_mean
from anvi._data.fits import check_free, check_no_own, check_reads_no_own, odd_cells
from anvi._data.labels import Known, Tree, known_labels
from anvi._data.predictions import colors_of, write_colors, write_predictions
from anvi._data.setup import FEW_CELLS, VARIABLE, Genes, Setup, find_setup, tell_genes, too_many_genes
from anvi._files import only_writer
from anvi._find import find_model
from anvi._fit.loop import fit, generator, seeds
from anvi._fit.plan import Plan
from anvi._fit.ranks import found, meet, one_voice
from anvi._fit.start import NO_OPTIONS, make_config, make_network, settle_rows, start_from
from anvi._model import Model
from anvi._posterior import encode
from anvi._posterior.confidence import FALSE_REJECTS, calibrated, novelties
from anvi._posterior.imputation import with_imputation
from anvi._runtime import give_back_memory, made_current, own_torch, usable_memory
from anvi.nn import VAE, Config
from anvi.settings import choose_device, settings

logger = logging.getLogger("anvi")

Callback = Callable[[dict[str, float]], object]
OF_LABELS = ("linear_classifier", "label_prior", "dropout_u", "classification_ratio", "labelled_batch_size")
OF_LABELS += ("label_smoothing", "n_neighbors", "labels_key", "label_tree", "unlabeled_category")
OF_PROTEINS = ("protein_dispersion", "protein_weight", "hide_proteins", "hide_rna", "efficiency")
OF_PROTEINS += ("panel_key", "missing", "proteins", "prot_mod", "prot_obsm")


class Options(TypedDict, total=False):
    """Rarer options of a fit, of the network and of the training; see :class:`anvi.nn.Config` and the user guide."""

    n_hidden: int
    n_layers_encoder: int
    n_layers_decoder: int
    dropout_encoder: float
    dropout_decoder: float
    dropout_u: float
    protein_dispersion: Literal["protein", "protein-batch"]
    library: Literal["observed", "latent"]
    latent_distribution: Literal["normal", "ln"]
    log_variational: bool
    use_batch_norm: Literal["encoder", "decoder", "none", "both"]
    use_layer_norm: Literal["encoder", "decoder", "none", "both"]
    encode_covariates: bool
    deeply_inject_covariates: bool
    efficiency: bool
    objective: Literal["bound", "scvi-tools"]
    labelled_batch_size: int
    weight_decay: float
    adam_eps: float
    warmup: float
    patience: int
    protein_weight: float
    hide_proteins: float
    hide_rna: float
    thin_counts: float
    label_smoothing: float
    max_kl_weight: float
    adversary: bool
    n_neighbors: int
    max_grad_norm: float
    max_retries: int


SETUP_ARGUMENTS = set(inspect.signature(find_setup).parameters) - {"data", "counts", "standardise"}
"""Arguments of a fit that say where things are in the object; the others are options of network and training."""


@own_torch()
@one_voice()
def run_fit(
    name: str,
    data: Data,
    *,
    model_kwargs: Options,
    init: str | Path | Model | None = None,
    train: Literal["all", "label_nets"] = "all",
    device: str = "auto",
    random_state: RandomState = 0,
    key_added: str | None = None,
    copy: bool = False,
    checkpoint: str | Path | None = None,
    max_minutes: float | None = None,
    stream: bool | None = None,
    callback: Callback | None = None,
    **arguments,
) -> Data | None:
    """Fit one of the four models with the arguments of its public verb, and write what belongs to a fit."""
    where = {argument: value for argument, value in arguments.items() if argument in SETUP_ARGUMENTS}
    options = {argument: value for argument, value in arguments.items() if argument not in where} | model_kwargs
    begun = time.monotonic()
    where_to = made_current(choose_device(device))
    meet()
    most = held_at_most(stream, where_to)
    if checkpoint is not None and Path(checkpoint).expanduser().is_dir():
        raise ValueError(f"checkpoint='{checkpoint}' is a folder: name a file in it.")
    if max_minutes is not None and not max_minutes > 0:
        raise ValueError(f"max_minutes={max_minutes} must be above 0.")
    if name in ("scanvi", "totalanvi") and arguments["labels_key"] is None:
        raise ValueError("labels_key=None: name the column of the labels. Without labels use tl.totalvi or tl.scvi.")
    if train == "label_nets" and init is None:
        raise ValueError("train='label_nets' needs init=: without it the rest of the network would stay random.")
    network_options, plan_options = _sort_options(name, options)
    # where things are in the object, and what network that makes
    source = Source(data)
    key = slots.clean_key(name if key_added is None else key_added)
    check_free(source, key, joint=name in ("totalvi", "totalanvi"), rna_mod=arguments["rna_mod"])
    seed = seed_of(random_state)
    proteins = where.pop("proteins", False)  # which; the RNA models do not ask
    as_published = network_options.get("objective") == "scvi-tools"  # which takes covariates as they are
    counts = network_options.get("gene_likelihood") != "normal"
    first_fit = f"av.tl.{name.replace('an', '')}(data)"  # totalvi for totalanvi, scvi for scanvi
    first = None if init is None else find_model(source, init, "init", first_fit)[0]
    genes, by = where.pop("genes", "auto"), "genes= names"
    if isinstance(genes, str) and genes == "auto" and (first is not None or as_published):
        there = source.modality(where["rna_mod"], "rna_mod").var_names.astype(str)
        if first is None:
            genes = "all"  # scvi-tools takes all that there are
        elif set(first.setup.genes) <= set(there):
            genes, by = first.setup.genes, "the model of init= has"
    setup = find_setup(source, proteins=proteins, counts=counts, standardise=not as_published, genes=genes, **where)
    setup = setup if first is None else setup.in_order_of(first.setup)
    if first is not None and first.setup.continuous == setup.continuous:
        setup = replace(setup, continuous_scale=first.setup.continuous_scale)  # what its weights were made for
    config = make_config(name, setup, network_options, None if first is None else first.config)
    check_no_own(source, setup, key)
    check_reads_no_own(setup, key)
    # the cells
    cells = read_cells(source, setup, labels=True, most=most)
    if setup.size_factor_key is not None and counts and not as_published:
        # the unit of size factors must not matter: priors and intercepts are made for libraries of counts
        factors = cells.log_library[cells.with_rna]
        scale = cells.x.total / float(factors.double().exp().sum())
        scale = scale if first is None else first.setup.size_factor_scale
        setup = replace(setup, size_factor_scale=scale)
        cells = replace(cells, log_library=cells.log_library + math.log(scale))
    setup = with_library(setup, cells)
    known = known_labels(source, setup, pd.Index(cells.names)) if config.has_labels else None
    colors = colors_of(source, setup.labels_key, setup.classes) if config.has_labels else None
    _log_data(source, cells, setup, genes, by, where.get("label_tree"))
    n_genes = source.modality(setup.rna_mod, "rna_mod").n_vars
    del source  # and the proteins that it keeps
    give_back_memory()
    # which of them train, and how
    init_seed, split_seed, fit_seed = seeds(seed, 3)
    plan = Plan(**plan_options)
    plan.check()
    train_cells, validation_cells = split(cells, plan.train_size, generator(split_seed))
    if len(train_cells) < 2:
        raise ValueError(f"{len(cells)} cells leave {len(train_cells)} to train on; at least two are needed.")
    if not len(validation_cells) and plan.early_stopping:
        logger.info("too few cells for a validation split: no early stopping")
    plan = plan if config.has_protein else replace(plan, hide_proteins=0.0, hide_rna=0.0)
    plan = plan.for_cells(
        len(train_cells),
        warm_start=first is not None,
        transfer=config.has_labels and config.objective == "bound",
        unstained=cells.has_protein is not None and not bool(cells.has_protein.all()),
        without_rna=cells.has_rna is not None,
        genes_per_protein=config.n_genes / max(1, config.n_proteins),
    )
    _check_plan(plan, config)
    setup = replace(setup, needs_rna=not plan.hide_rna and cells.has_rna is None)
    # train
    network = make_network(config, cells, init_seed)
    if first is not None:
        start_from(network, setup, first.network, first.setup, train)
    saved = None if checkpoint is None else Path(checkpoint).expanduser()
    with found(where_to, saved) as ranks, only_writer(None if ranks.rank else saved):
        network, on_device = network.to(ranks.device), cells.to(ranks.device)
        training = time.monotonic()
        history = fit(
            network,
            on_device,
            train_cells,
            validation_cells,
            plan,
            random_state=fit_seed,
            checkpoint=saved,
            deadline=math.inf if max_minutes is None else begun + 60 * max_minutes,
            callback=callback,
            fingerprint=_fingerprint(cells, setup, network, plan, [seed, train]) if saved or ranks.size > 1 else "",
            ranks=ranks,
        )
    if ranks.rank:  # the first has the answers
        return slots.own(data, copy) if copy else None
    # the model, what held-out cells say of it, and what it says of the cells
    choice = "all" if len(setup.genes) == n_genes else VARIABLE if isinstance(genes, str) else "listed"
    settle_rows(network, on_device)
    give_back_memory()
    info = {"key": key, "genes": choice} | ({"processes": ranks.size} if ranks.size > 1 else {})
    info |= info_of(cells, plan, seed, history, time.monotonic() - training, train_cells, ranks.device)
    held_out = on_device, train_cells, validation_cells, seed
    model, table = calibrated(Model(name, setup, network, history, info), *held_out)
    model = with_imputation(model, *held_out)
    on_device.x.let_go()  # answers take one pass over all cells
    give_back_memory()
    embedding = encode.embed(model, on_device)
    model = model.on(torch.device("cpu"))
    # write
    data = slots.own(data, copy)
    told = {"known": known, "colors": colors, "calibration": table}
    write_fit(data, key, model, cells, embedding, validation_cells.numpy(), **told)
    return data if copy else None


def write_fit(
    data: Data,
    key: str,
    model: Model,
    cells: Cells,
    embedding: encode.Embedding,
    validation: np.ndarray | None,
    *,
    known: Known | None = None,
    colors: list[str] | None = None,
    columns: Mapping[str, pd.Series] | None = None,
    **entries: object,
) -> None:
    """Write latent space, predictions, split, history and the model itself.

    Parameters
    ----------
    data, key, model, cells
        Where to, under which prefix, and what was fitted to which cells.
    embedding
        Output of :func:`anvi._posterior.encode.embed` for the cells.
    validation
        Positions of the validation cells; None if no cell was trained on.
    known
        What the user says of each cell, where the model has labels.
    colors
        Colours of the classes.
    columns
        Columns of obs that the cells were read with and that the object lacks.
    entries
        More for `uns[key]`: what the model was mapped onto, the reliability of its probabilities.
    """
    setup = model.setup
    # compute and serialise everything
    features = {setup.rna_mod: list(setup.genes)} | ({setup.prot_mod: list(setup.proteins)} if setup.joint else {})
    keys = ("batch_key", "labels_key", "panel_key", "unlabeled_category")
    levels = setup.levels
    if levels.coarser:
        entries["label_levels"] = pd.DataFrame(dict(zip(levels.names, levels.table, strict=True)), list(model.classes))
    params = {name: fact for name, fact in model.info.items() if name != "reference"}
    entry = {
        "params": params | {"method": model.name} | {name: getattr(setup, name) for name in keys},
        "classes": list(model.classes),
        "features": features,
        "batches": list(setup.batches),
        "panels": list(setup.panels),
        "model": model.to_slot(),
        "history": model.history,
    } | {name: value for name, value in entries.items() if value is not None}
    far = None if embedding.proba is None else novelties(model, cells, embedding, FALSE_REJECTS)
    # then write
    with slots.writer(data, setup, cells.names) as out:
        for slot, column in (columns or {}).items():
            out.column(slot, column)
        out.clear(key)
        out.obsm(slots.latent(key), embedding.mean)
        if embedding.proba is not None:
            write_predictions(out, key, levels, embedding.proba, soft=True, known=known, far=far)
            if colors is not None:
                write_colors(out, key, model.classes, colors)
        if validation is not None:
            codes = np.zeros(len(cells), dtype=int)
            codes[validation] = 1
            out.obs(slots.split(key), pd.Categorical.from_codes(codes, categories=["train", "validation"]))
        out.uns(key, entry)


def held_at_most(stream: bool | None, device: torch.device) -> float:
    """Bytes that counts from a file may take in memory; if they would take more, they are streamed."""
    if stream is None:
        return max(1.0, settings.stream_above * usable_memory(device))
    return 0.0 if stream else math.inf


def foreign_options(name: str) -> dict[str, str]:
    """Options that a model does not have, and which models do."""
    labels, proteins = "labels (tl.scanvi, tl.totalanvi)", "proteins (tl.totalvi, tl.totalanvi)"
    of_labels = {} if name.endswith("anvi") else dict.fromkeys(OF_LABELS, labels)
    return of_labels if name.startswith("total") else of_labels | dict.fromkeys(OF_PROTEINS, proteins)


def _sort_options(model: str, options: dict) -> tuple[dict, dict]:
    """Options of the network and of the training; an unknown one raises a TypeError that names its neighbours."""
    network_names = {field.name for field in fields(Config)} - set(NO_OPTIONS)
    plan_names = {field.name for field in fields(Plan)}
    foreign = foreign_options(model)
    for key in options:
        if key in foreign:
            raise TypeError(f"tl.{model} has no option '{key}': it belongs to models with {foreign[key]}.")
    unknown = sorted(set(options) - network_names - plan_names)
    if unknown:
        hint = did_you_mean(unknown[0], sorted(network_names | plan_names | SETUP_ARGUMENTS))
        raise TypeError(f"There is no option '{unknown[0]}'.{hint}")
    options = {key: value for key, value in options.items() if value is not None}
    for field in (*fields(Config), *fields(Plan)):
        if field.name in options:
            check_argument(field.name, options[field.name], field.type)
    options = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    network = {key: value for key, value in options.items() if key in network_names}
    return network, {key: value for key, value in options.items() if key in plan_names}


def _log_data(source: Source, cells: Cells, setup: Setup, genes: Genes, by: str, tree: Tree | None) -> None:
    rna, where = source.modality(setup.rna_mod, "rna_mod"), source.name(setup.rna_mod)
    many = too_many_genes(setup, len(cells), where, alone=source.alone)
    for told in filter(None, (many, *odd_cells(source, setup, tree), *remarks(cells, setup))):
        logger.warning(told)
    parts = [f"{len(cells)} cells", tell_genes(rna, setup, genes, by)]
    if setup.joint:
        n_measured = int(cells.has_protein.sum())
        alone = "" if cells.has_rna is None else f", {int((~cells.has_rna).sum())} nothing else"
        parts.append(f"{len(setup.proteins)} proteins ({n_measured} cells have some{alone})")
        if split := split_targets(setup.proteins, setup.panels, setup.measured):
            logger.warning(f"proteins: {split}")
    if len(setup.batches) > 1:
        parts.append(f"{len(setup.batches)} batches")
    if setup.classes:
        counts = torch.bincount(cells.label[cells.label >= 0], minlength=len(setup.classes)).tolist()
        and_coarse = f", {int(cells.coarse.sum())} more coarsely" if setup.label_levels else ""
        parts.append(f"{len(counts)} classes ({sum(counts)} cells labelled{and_coarse})")
        rare = [f"{name} ({n})" for name, n in zip(setup.classes, counts, strict=True) if n < FEW_CELLS]
        if rare:
            some = f"{', '.join(rare[:8])}{f' and {len(rare) - 8} more' * (len(rare) > 8)}"
            logger.warning(f"labels_key='{setup.labels_key}': few labelled cells of {some}; expect poor recall there")
    logger.info(", ".join(parts))


def _fingerprint(cells: Cells, setup: Setup, network: VAE, plan: Plan, others: list) -> str:
    """What a checkpoint must belong to: cells, counts, covariates, first weights, options, seed, version."""
    digest = hashlib.sha256("\n".join(map(str, cells.names)).encode())
    if cells.streamed:  # how many counts a cell has, and their sum: reading all once more would take too long
        digest.update(cells.x.indptr.numpy())
        digest.update(cells.x.edges.numpy())
    for rows in () if cells.streamed else cells.x_row.split(10_000):  # whatever the order of the modality
        for part in cells.x.entries(rows):
            digest.update(part.numpy())
    for rows in () if cells.y is None else torch.arange(len(cells)).split(10_000):
        digest.update(cells.proteins(rows).numpy())
    proteins = () if cells.y is None else (cells.mask_row,)
    covariates = [part for part in (cells.codes, cells.continuous, cells.panel) if part is not None]
    first_weights = [weights.cpu().contiguous() for weights in network.state_dict().values()]
    for tensor in (cells.log_library, cells.told, cells.batch, *proteins, *covariates, *first_weights):
        digest.update(tensor.numpy())
    facts = [setup.to_dict(), network.config.to_dict(), plan.to_dict(), settings.precision, *others, version("anvi")]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return f"stream={cells.streamed} {digest.hexdigest()}"


def _check_plan(plan: Plan, config: Config) -> None:
    """Raise where an option of the training means nothing for this network."""
    if plan.thin_counts > 0 and config.gene_likelihood == "normal":
        raise ValueError("thin_counts thins counts, and gene_likelihood='normal' has none. Use thin_counts=0.0.")
    if plan.max_kl_weight < 1 and config.objective == "scvi-tools":
        raise ValueError("objective='scvi-tools' weighs its divergences as scvi-tools does. Use max_kl_weight=1.0.")


def info_of(cells, plan: Plan, seed: int, history, seconds: float, train_cells, device) -> dict:
    """Facts of a fit that a model keeps: options, seed, numbers of cells and epochs, versions."""
    coarse = {} if cells.label_table is None else {"n_labelled_coarsely": int(cells.coarse.sum())}
    best = history["validation_loss"].idxmin() if "validation_loss" in history else len(history) - 1
    return {
        **plan.to_dict(),
        "random_state": seed,
        "n_cells": len(cells),
        "n_train": len(train_cells),
        "n_labelled": int((cells.label >= 0).sum()),
        **coarse,
        **({"streamed": True} if cells.streamed else {}),
        "epochs": len(history),
        "best_epoch": int(best) + 1,  # as the history and its plots count
        "seconds": round(seconds, 1),
        "device": str(device),
        "anvi": version("anvi"),
        "anndata": version("anndata"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    } | history.attrs
