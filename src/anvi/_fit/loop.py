"""The one training loop: warm-up, validation, early stop with the best weights, history, recovery, resume."""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from anvi._data.batches import Minibatches, chunks, labelled_first
from anvi._data.cells import Cells
from anvi._files import parse_json, sealed, unsealed, write_bytes
from anvi._runtime import Stop, Threads
from anvi.nn import DIVERGENCES, VAE, Draws, Weights
from anvi.settings import Progress

from .graph import CapturedStep
from .plan import Plan
from .ranks import Ranks
from .step import TERMS, Adam, Adversary, State, run_step, summarise

logger = logging.getLogger("anvi")

AT_ONCE = 2**24
"""Counts, zeros too, that are validated together on a GPU."""


def seeds(random_state: int, n: int) -> list[int]:
    """Independent seeds for the generators of one fit."""
    return [int(seed) for seed in np.random.SeedSequence(random_state).generate_state(n)]


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of our own."""
    return torch.Generator(device=device).manual_seed(seed)


def fit(
    network: VAE,
    cells: Cells,
    train: Tensor,
    validation: Tensor,
    plan: Plan,
    *,
    random_state: int,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    deadline: float = math.inf,
    callback: Callable[[dict[str, float]], object] | None = None,
    ranks: Ranks | None = None,
) -> pd.DataFrame:
    """Train the network in place and leave the best weights in it.

    Parameters
    ----------
    network
        On the device, with its first weights.
    cells
        All cells, on the device.
    train, validation
        Positions of training and validation cells.
    plan
        Complete options (:meth:`Plan.for_cells`).
    random_state
        Seed of shuffling, noise and dropout.
    checkpoint
        File that is written after every epoch, and from which the fit goes on if it is there.
    fingerprint
        What data and model a checkpoint must belong to.
    deadline
        When to end at the latest, by `time.monotonic()`.
    callback
        Called after every epoch with a copy of its row.
    ranks
        The processes that make this fit together; None: this one alone.

    Returns
    -------
    One row per epoch: every term, train and validation, in nats per cell. A fit that was ended by Ctrl-C or the
    deadline has a last row for the steps of its unfinished epoch, and says why in `attrs["ended"]`.

    Raises
    ------
    FloatingPointError
        If the loss stays non-finite after rolling back and lowering the rate `plan.max_retries` times; the message
        names the cells of the minibatch.
    """
    device = cells.label.device
    ranks = ranks or Ranks(device)
    ranks.check_same(fingerprint)
    state = _start(network, cells, plan, random_state, device, ranks)
    if ranks.largest(int(ranks.rank == 0 and checkpoint is not None and checkpoint.exists())):
        load_checkpoint(checkpoint, ranks.of_first(lambda: _bytes_of_checkpoint(checkpoint)), state, fingerprint)
        logger.info(f"going on from {checkpoint} after epoch {state.epoch}")
    size, n_labelled = plan.batch_size, _labelled_size(network, plan)
    minibatches = Minibatches(cells, train, size, n_labelled, state.shuffle, ranks.size)
    group = _adversary_groups(cells)
    validation = labelled_first(cells, validation.to(device))
    cells.x.hold(cells.x_row.cpu()[torch.cat([validation.cpu(), *minibatches.classes])])  # what comes again and again
    run = _runner(network, cells, ranks)
    threads = Threads(device, state.n_threads)
    with (
        ranks.together(network, state.adversary),
        Stop(deadline, ranks.largest) as stop,
        Progress(plan.max_epochs, done=state.epoch) as progress,
    ):
        while not state.finished:
            lr = plan.learning_rate(state.epoch) * state.lr_scale
            shares = plan.protein_weight, plan.classification_ratio, plan.label_smoothing
            weights = Weights(plan.kl_weight(state.epoch), *shares)
            state.optimizer.set_rate(lr)
            last_good = {
                part: {name: one.clone() for name, one in of.state_dict().items()} for part, of in state.parts.items()
            }
            # train and validate
            ranks.own_noise(state.noise, random_state, state.epoch, state.retries)
            steps = minibatches.plan()
            with minibatches.reading():
                row, bad_step = _train_epoch(state, run, minibatches, steps, group, weights, plan, threads, stop)
            suspects = None if bad_step is None else steps[bad_step].index
            if bad_step is None and len(validation):
                scores = ranks.of_first(
                    lambda: json.dumps(_validate(network, cells, validation, plan, random_state)).encode()
                )
                row |= json.loads(scores)
                suspects = None if np.isfinite(row["validation_loss"]) else validation
            # back where a loss was not finite
            if suspects is not None:
                _roll_back(state, last_good, cells, suspects, plan)
                run = _runner(network, cells, ranks)  # a graph may point at slots of Adam that are gone
                continue
            # keep what was reached
            row = {"epoch": state.epoch + 1, **row, "kl_weight": weights.kl, "lr": lr}
            state.history.append(row)
            state.epoch += 1
            _judge(state, row, plan)
            progress.advance(row)
            if callback is not None and ranks.rank == 0:
                callback(dict(row))
            if stop.reason is not None and not state.finished:
                break
            threads.epoch()
            state.n_threads = 0 if threads.measuring else threads.n
            if checkpoint is not None and ranks.rank == 0:
                save_checkpoint(checkpoint, state, fingerprint)
        ended = None if state.finished else stop.reason
    if ended is not None:
        best = f", with the weights of epoch {state.best_epoch + 1}" if state.best_weights is not None else ""
        goes_on = "" if checkpoint is None else f"; the same call goes on from {checkpoint}"
        logger.warning(f"{ended} ended the fit in epoch {state.epoch} of {plan.max_epochs}{best}{goes_on}")
    if state.best_weights is not None:
        network.load_state_dict(state.best_weights)
    network.eval().zero_grad(set_to_none=True)  # gradients are as large as the model, and hold on to a graph's memory
    history = pd.DataFrame(state.history)
    history.attrs = {} if ended is None else {"ended": ended}
    return history


def _start(
    network: VAE, cells: Cells, plan: Plan, random_state: int, device: torch.device, ranks: Ranks | None = None
) -> State:
    shuffle_seed, noise_seed, adversary_seed = seeds(random_state, 3)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    adversary = None
    if plan.adversary or (plan.adversary is None and panels_differ(cells)):
        n_groups = int(_adversary_groups(cells).max()) + 1
        if n_groups > 1:
            adversary = Adversary(network.config.n_latent, n_groups, generator(adversary_seed)).to(device)
        elif plan.adversary:
            raise ValueError("adversary=True needs at least two batches or panels; there is one.")
    return State(
        network=network,
        optimizer=Adam(trained, plan.lr, plan.adam_eps, plan.weight_decay),
        adversary=adversary,
        adversary_optimizer=(
            None if adversary is None else Adam(adversary.parameters(), 1e-3, plan.adam_eps, plan.weight_decay)
        ),
        shuffle=generator(shuffle_seed),
        noise=generator(noise_seed, device),
        ranks=ranks or Ranks(device),
    )


def _runner(network: VAE, cells: Cells, ranks: Ranks):
    """How a step is run: as a graph where one process has a GPU and the shapes can be fixed, eagerly else."""
    fixed = ranks.size == 1 and not cells.streamed and not network.needs_dense_counts
    return CapturedStep(ranks.device) if ranks.device.type == "cuda" and fixed else run_step


def _labelled_size(network: VAE, plan: Plan) -> int:
    return plan.labelled_batch_size if network.labels is not None and plan.classification_ratio > 0 else 0


def panels_differ(cells: Cells) -> bool:
    """Whether some group of cells had a protein measured that another had in no cell."""
    if cells.mask_table is None:
        return False
    group, row, table = _adversary_groups(cells), cells.mask_row, cells.mask_table.float()
    if cells.has_rna is not None:  # RNA is one more, which some cells have
        row = row + len(table) * cells.has_rna
        without, with_rna = (functional.pad(table, (0, 1), value=value) for value in (0.0, 1.0))
        table = torch.cat([without, with_rna])
    pair = (group * len(table) + row).unique()  # what occurs in a group
    some = table.new_zeros(int(group.max()) + 1, table.shape[1])
    some = some.index_add_(0, pair // len(table), table[pair % len(table)]) > 0  # (groups, proteins, and RNA)
    return bool((some != some[0]).any())


def _adversary_groups(cells: Cells) -> Tensor:
    """What the adversary tells apart: batches, or else panels, or else cells with and without proteins or RNA."""
    group = cells.batch
    if group.max() == 0 and cells.mask_table is not None:
        modalities = cells.has_protein.long()
        modalities = modalities if cells.has_rna is None else modalities + 2 * cells.has_rna
        group = cells.panel if cells.panel.max() > 0 else modalities
    return group.unique(return_inverse=True)[1]  # only groups that occur


def _judge(state: State, row: dict[str, float], plan: Plan) -> None:
    """Keep the weights if they are the best so far; say whether the fit is over."""
    last = state.epoch - 1
    if "validation_loss" in row:
        if row["validation_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = row["validation_loss"], last
            state.best_weights = {name: value.clone() for name, value in state.network.state_dict().items()}
        elif plan.early_stopping and last - max(state.best_epoch, plan.last_warmup_epoch) >= plan.patience:
            logger.info(f"stopped after epoch {last + 1}: no better validation loss since epoch {state.best_epoch + 1}")
            state.finished = True
    if state.epoch >= plan.max_epochs:
        state.finished = True


def _train_epoch(
    state: State, run, minibatches, steps, group, weights: Weights, plan: Plan, threads: Threads, stop: Stop
):
    """All steps of an epoch, fewer if the fit is told to stop; the host waits for the device once, at the end."""
    network = state.network
    for part in network.children():  # explicitly: no fit runs in eval mode, but for parts that are wholly frozen
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
    cells, fooling = minibatches.cells, state.adversary is not None and weights.kl < 1
    kept = None  # (steps, 1 + sums)
    for i, choice in enumerate(map(state.ranks.share, steps)):
        with threads.step():
            done = run(state, cells, choice, group, weights, plan, fooling=fooling)
        if kept is None:
            kept = done.numbers.new_empty(len(steps), len(done.numbers))
        kept[i] = done.numbers
        if stop.reason is not None:
            kept = kept[: i + 1]
            break
    kept = state.ranks.add_up(kept).cpu()
    host_losses = kept[:, 0].contiguous()
    bad = (~torch.isfinite(host_losses)).nonzero()
    if len(bad):
        return {}, int(bad[0])
    sums = dict(zip(done.names, sum(kept[1:, 1:], start=kept[0, 1:]), strict=True))
    return {"train_loss": float(host_losses.mean())} | _averages(sums, "train"), None


def _averages(sums: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Means per cell, or per labelled cell, and the bound, of all terms; the only place where sums leave the device."""
    values = {name: float(value) for name, value in sums.items()}
    n_cells, n_labelled = values.pop("cells"), values.pop("labelled", 1.0) or 1.0
    values = {"elbo": -sum(values.get(name, 0.0) for name in TERMS)} | values
    per_label = ("classification_loss", "accuracy")
    return {
        f"{prefix}_{name}": value / (n_labelled if name in per_label else n_cells) for name, value in values.items()
    }


@torch.no_grad()
def _validate(network: VAE, cells: Cells, validation: Tensor, plan: Plan, random_state: int) -> dict[str, float]:
    """Terms, and the loss at the weights after the warm-up; the noise is the same in every epoch."""
    network.eval()
    draws = Draws(generator(random_state, cells.label.device))
    sums: dict[str, Tensor] = {}
    # the two ways of the first layer differ in rounding; on a GPU the sparse one is much the faster
    dense = network.needs_dense_counts or not validation.is_cuda
    # and a chunk takes as long as its launches
    size = max(4 * plan.batch_size, AT_ONCE // cells.x.n_columns if validation.is_cuda else 0)
    for batch in chunks(cells, validation, size, dense=dense):
        for name, value in summarise(network.terms(batch, None, draws), batch).items():
            sums[name] = sums.get(name, 0) + value
    row = _averages(sums, "validation")
    weighed = -row["validation_elbo"] + plan.classification_ratio * row.get("validation_classification_loss", 0.0)
    weighed += (plan.protein_weight - 1) * row.get("validation_reconstruction_protein", 0.0)
    divergences = sum(row.get(f"validation_{name}", 0.0) for name in DIVERGENCES)
    weighed -= (1 - plan.max_kl_weight) * divergences
    return {"validation_loss": weighed} | row


def _roll_back(state: State, last_good: dict, cells: Cells, index: Tensor, plan: Plan) -> None:
    state.retries += 1
    for part, of in state.parts.items():
        of.load_state_dict(last_good[part])
    names = cells.names[index.cpu().numpy()]
    if state.retries > plan.max_retries:
        raise FloatingPointError(
            f"The loss became non-finite in epoch {state.epoch + 1} and stayed so after {plan.max_retries} retries at "
            f"lower rates. It was that of the cells {', '.join(names[:8])}, ...: look for extreme counts "
            "(pp.check) or covariates there, or pass a lower lr=."
        )
    state.lr_scale *= 0.5
    logger.warning(
        f"non-finite loss in epoch {state.epoch + 1}: back to the weights before it, learning rate halved "
        f"(retry {state.retries} of {plan.max_retries})"
    )


# checkpoints -------------------------------------------------------------------------------------------------------
_HEAD = re.compile(rb'.{8}\{"__metadata__": ?\{"state": ?"\{\\"epoch', re.DOTALL)
"""How a checkpoint begins: the length of a header, and the state."""
_SCALARS = ("epoch", "lr_scale", "retries", "best_loss", "best_epoch", "history", "finished", "n_threads")


def save_checkpoint(path: Path, state, fingerprint: str) -> None:
    """Write the whole state of a fit; the file is replaced at once, so a kill leaves the old or the new one."""
    tensors = {f"best/{name}": value for name, value in (state.best_weights or {}).items()}
    for part, of in state.parts.items():
        tensors |= {f"{part}/{name}": value for name, value in of.state_dict().items()}
    tensors |= {"shuffle": state.shuffle.get_state(), "noise": state.noise.get_state()}
    scalars = {name: getattr(state, name) for name in _SCALARS} | {"fingerprint": fingerprint}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_bytes(path, sealed(save(tensors, {"state": json.dumps(scalars)})))


def _bytes_of_checkpoint(path: Path) -> bytes:
    """What a checkpoint holds; of another file the beginning alone, which may be all of somebody's data."""
    with path.open("rb") as file:
        head = file.read(64)
        return head + file.read() if _HEAD.match(head) else head


def load_checkpoint(path: Path, raw: bytes, state, fingerprint: str) -> None:
    """Put a saved state, what the file holds, into a freshly started one.

    Raises
    ------
    ValueError
        If the file is damaged or no checkpoint, or belongs to other data, another model or other options.
    """
    if not _HEAD.match(raw):
        raise ValueError(
            f"{path} is not a checkpoint that anvi can read, but a file of another kind, which is left alone: give "
            "this fit another checkpoint=."
        )
    try:
        scalars: Any = parse_json(unsealed(raw, required=True)["state"])
        tensors = load(raw)
        _check_scalars(scalars)
    except Exception as error:  # of JSON and safetensors: whatever they raise at bytes that make no sense
        raise ValueError(
            f"{path} is not a checkpoint that anvi can read ({error}); delete it to start anew."
        ) from error
    saved = str(scalars.pop("fingerprint"))
    theirs, ours = (one.partition(" ")[0] for one in (saved, fingerprint))
    if theirs != ours and theirs in ("stream=True", "stream=False"):
        raise ValueError(
            f"{path} belongs to a fit with {theirs}, and this one has {ours}, so that its minibatches are others (by "
            f"default, the memory of the machine decides). Pass {theirs} to go on with it, or another checkpoint=."
        )
    if saved != fingerprint:
        raise ValueError(
            f"{path} belongs to another fit (other cells, genes, options, stream= or anvi version). "
            "Give this fit another checkpoint=, or delete the file to start anew."
        )
    _check_tensors(path, state, tensors)
    for name in _SCALARS:
        setattr(state, name, scalars[name])
    for part, of in state.parts.items():
        of.load_state_dict(_under(part, tensors))
    state.best_weights = _under("best", tensors) or None
    state.shuffle.set_state(tensors["shuffle"].cpu())
    state.noise.set_state(tensors["noise"].cpu())


_KINDS = {"epoch": int, "lr_scale": float, "retries": int, "best_loss": float, "best_epoch": int, "finished": bool}


def _check_scalars(scalars: dict) -> None:
    """Raise a ValueError unless the state beside the tensors is of the right kinds."""
    if not isinstance(scalars, dict) or set(scalars) != {*_SCALARS, "fingerprint"}:
        raise ValueError("its state is not that of a fit")
    for name, kind in _KINDS.items():
        if type(scalars[name]) not in (kind, int if kind is float else kind) or scalars[name] != scalars[name]:
            raise ValueError(f"its {name} is {scalars[name]!r:.50}")
    rows, epoch = scalars["history"], scalars["epoch"]
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and all(type(value) in (int, float) for value in row.values()) for row in rows
    )
    good = good and len(rows) == epoch and -1 <= scalars["best_epoch"] < max(1, epoch)
    if not good or not 0 < scalars["lr_scale"] <= 1 or scalars["retries"] < 0:
        raise ValueError("its history does not go with its epoch")


def _check_tensors(path: Path, state, tensors: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError unless every tensor has its place, size and kind: the optimiser trusts them blindly."""
    expected: dict[str, Tensor] = {}
    for part, of in state.parts.items():
        if isinstance(of, Adam):  # a parameter that has had no gradient yet has none of these
            trained = {i: value for i, value in enumerate(of.parameters) if f"{part}/{i}/step" in tensors}
            names = ("exp_avg", "exp_avg_sq")
            expected |= {f"{part}/{i}/{name}": value for i, value in trained.items() for name in names}
            expected |= {f"{part}/{i}/step": torch.zeros(()) for i in trained}
        else:
            expected |= {f"{part}/{name}": value for name, value in of.state_dict().items()}
    if any(name.startswith("best/") for name in tensors):
        expected |= {f"best/{name}": value for name, value in state.network.state_dict().items()}
    expected |= {"shuffle": state.shuffle.get_state(), "noise": state.noise.get_state()}
    odd = sorted(set(tensors) ^ set(expected))
    odd += [
        name
        for name in set(tensors) & set(expected)
        if (tensors[name].shape, tensors[name].dtype) != (expected[name].shape, expected[name].dtype)
    ]
    odd += [name for name in tensors if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all())]
    if odd:
        raise ValueError(
            f"{path} is not a checkpoint that anvi can read (its tensor '{odd[0]}' is not that of this fit); delete it "
            "to start anew."
        )


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
