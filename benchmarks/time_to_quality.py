"""Seconds of a default fit, and seconds until scvi-tools answers as well: one process, the same cells and threads.

    ANVI_DATA_DIR=... python benchmarks/time_to_quality.py --seeds 1 --out benchmarks/results/time_to_quality.json

anvi is fitted by its defaults, once, and asked for the labels and hidden proteins of the query. scvi-tools is trained
by its own defaults for 400 epochs at most; at the epochs of `LOOKS` it is asked the same, outside the clock. Reported
is the first look at which it is as good in macro-F1 and, where proteins are hidden, in Pearson correlation (each alone,
and both), or the look at which it was best, if it never was as good. With `--shorter`, fits of anvi with fewer epochs
follow, each whole, until one is as good as what scvi-tools reached: the seconds of both to one score. Clocks count the
seconds of the processor in this process, which other jobs on the machine change little; seconds on the wall are kept
beside them.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import real_tasks
import torch
import transfer

import anvi as av

LOOKS = (5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 400)
"""Epochs of scvi-tools after which it is asked."""
SHORTER = (5, 10, 20, 40)
"""Epochs of anvi's fits that are shorter than its default."""
TASKS = ("random split", "shallow, 40 %", "half panel", "labels 1 %", "rare classes of 5")
"""Of `transfer.py`."""
REAL = ("p3_0 to p4_0", "p3_0 to p1_0", "p4_0 to p1_0", "pbmc to eccite")
"""Of `real_tasks.py`."""
SCORES = ("macro_f1", "pearson")


@dataclass(frozen=True)
class Posed:
    """A task on data, whichever script made it."""

    name: str
    problem: transfer.Problem | real_tasks.Problem
    labels_key: str

    def score(self, proba: pd.DataFrame, proteins: np.ndarray | None) -> dict[str, float]:
        """Scores of answers for all cells: class probabilities, and counts of proteins `(cells, proteins)`."""
        query = self.problem.query
        proba = proba.loc[self.problem.mdata.obs_names[query]]
        if isinstance(self.problem, transfer.Problem):
            answer = transfer.Answer(proba, None if proteins is None else proteins[query])
            scores = transfer.score(self.problem, answer)
        else:
            answer = real_tasks.Answer(proba, None if proteins is None else np.log1p(np.clip(proteins, 0, None)))
            scores = real_tasks.score(self.problem, answer)
        return {name: scores[name] for name in ("accuracy", *SCORES) if name in scores}


def pose(name: str, source, samples, seed: int) -> Posed:
    """Make the task of this name."""
    if name in TASKS:
        problem = transfer.pose(source, (transfer.CHOOSE | transfer.REPORT)[name], seed)
        return Posed(name, problem, "cell_type")
    return Posed(name, real_tasks.pose(samples, real_tasks.REPORT[name], seed), "label")


@dataclass
class Clock:
    """Seconds that were counted, of the processor and on the wall."""

    cpu: float = 0.0
    wall: float = 0.0

    def __enter__(self):
        self.begun = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.cpu += time.process_time() - self.begun[0]
        self.wall += time.perf_counter() - self.begun[1]

    @property
    def row(self) -> dict[str, float]:
        return {"cpu_s": round(self.cpu, 1), "wall_s": round(self.wall, 1)}


def ours(posed: Posed, model: str, seed: int, max_epochs: int | None = None) -> dict[str, float]:
    """Scores of anvi's fit, by default as long as the data say, and its seconds."""
    mdata, clock = posed.problem.mdata.copy(), Clock()
    with clock:
        getattr(av.tl, model)(mdata, posed.labels_key, batch_key="batch", random_state=seed, max_epochs=max_epochs)
    proteins = None
    if model == "totalanvi":
        whole = av.tl.denoise(mdata, modality="prot", include_background=True, inplace=False)["prot"].to_pandas()
        proteins = whole.reindex(columns=posed.problem.mdata["prot"].var_names).to_numpy()
    return posed.score(av.get.proba(mdata), proteins) | clock.row


def peer(posed: Posed, model: str, seed: int, max_epochs: int, goal: dict) -> list[dict[str, float]]:
    """Scores of scvi-tools at every look, and its seconds until then; it is stopped when nothing is left to reach."""
    import scvi
    from lightning.pytorch.callbacks import Callback

    scvi.settings.seed = seed
    mdata, key = posed.problem.mdata, posed.labels_key
    rna, names = mdata["rna"].copy(), mdata["prot"].var_names
    rna.obs["batch"], rna.obs[key] = mdata.obs["batch"].to_numpy(), mdata.obs[key].to_numpy()
    keys = {"labels_key": key, "unlabeled_category": "Unknown", "batch_key": "batch"}
    joint, looks, clock = model == "totalanvi", [], Clock()
    if joint:
        y = np.zeros((rna.n_obs, len(names)), dtype=np.float32)
        measured = mdata["prot"].X
        measured = measured.toarray() if hasattr(measured, "toarray") else np.asarray(measured)
        y[rna.obs_names.get_indexer(mdata["prot"].obs_names)] = np.nan_to_num(measured)
        rna.obsm["protein"] = pd.DataFrame(y, index=rna.obs_names, columns=names)
        keys |= {"protein_expression_obsm_key": "protein"}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, module):
            epoch = trainer.current_epoch + 1
            if epoch not in LOOKS:
                return
            clock.__exit__()
            network.module.eval()
            network.is_trained_ = True
            proteins = None
            if joint:
                _, proteins = network.get_normalized_expression(return_mean=True, include_protein_background=True)
                proteins = proteins.to_numpy()
            looks.append({"epoch": epoch, **posed.score(network.predict(soft=True), proteins), **clock.row})
            print(f"    scvi-tools {looks[-1]}", file=sys.stderr, flush=True)
            network.module.train()
            left = [name for name in SCORES if name in goal and name in looks[-1] and looks[-1][name] < goal[name]]
            trainer.should_stop = not left
            clock.__enter__()

    chosen = scvi.external.TOTALANVI if joint else scvi.model.SCANVI
    clock.__enter__()
    chosen.setup_anndata(rna, **keys)
    network = chosen(rna)
    network.train(max_epochs=max_epochs, callbacks=[Look()], enable_progress_bar=False, logger=False, accelerator="cpu")
    clock.__exit__()
    return looks


def until(looks: list[dict], goal: dict, names: tuple[str, ...]) -> dict:
    """The first look that is as good as `goal` in all of `names`; else the best one, by their sum."""
    as_good = [look for look in looks if all(look[name] >= goal[name] for name in names)]
    chosen = as_good[0] if as_good else max(looks, key=lambda look: sum(look[name] for name in names))
    seconds = {clock: round(chosen[clock] / goal[clock], 1) for clock in ("cpu_s", "wall_s")}
    shown = {name: round(chosen[name], 3) for name in names}
    return {"as_good": bool(as_good), "epoch": chosen["epoch"], **shown, "ratio": seconds}


def to_the_same(
    posed: Posed, model: str, seed: int, goal: dict, theirs: dict, name: str, fits: dict[int, dict]
) -> dict:
    """The shortest of anvi's fits that is as good in `name` as scvi-tools was, and the seconds of both."""
    wanted = min(goal[name], theirs[name])
    for epochs in SHORTER:
        if epochs not in fits:
            fits[epochs] = ours(posed, model, seed, epochs)
        if fits[epochs][name] >= wanted:
            break
    else:
        epochs, fits = None, {None: goal}
    mine, peers = fits[epochs], round(theirs["ratio"]["cpu_s"] * goal["cpu_s"], 1)
    ratio = round(peers / mine["cpu_s"], 1)
    return {"wanted": wanted, "epochs": epochs, "cpu_s": mine["cpu_s"], "scvi_tools_cpu_s": peers, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=";".join(REAL + TASKS), help="names separated by ';'")
    parser.add_argument("--models", default="totalanvi,scanvi")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--max-epochs", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shorter", action="store_true", help="fits of anvi with fewer epochs, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    av.settings.n_threads = arguments.threads
    warnings.filterwarnings("ignore")
    av.settings.progress = False
    folder = Path(os.environ["ANVI_DATA_DIR"])
    source, samples = transfer.labelled_part(folder / "pbmc_citeseq.h5mu"), real_tasks.read_samples(folder)
    facts = {"command": " ".join(["python", *sys.argv]), "threads": arguments.threads}
    facts |= {name: version(name) for name in ("anvi", "scvi-tools", "torch")} | {"python": platform.python_version()}
    rows = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.tasks.split(";"):
            posed = pose(name, source, samples, seed)
            for model in arguments.models.split(","):
                goal = ours(posed, model, seed)
                print(f"{name}, {model}, seed {seed}: anvi {goal}", file=sys.stderr, flush=True)
                looks = peer(posed, model, seed, arguments.max_epochs, goal)
                scores = tuple(score for score in SCORES if score in goal and score in looks[0])
                sets = {name: (name,) for name in scores} | ({"both": scores} if len(scores) > 1 else {})
                reached = {what: until(looks, goal, names) for what, names in sets.items()}
                row = {"task": name, "model": model, "seed": seed}
                if arguments.shorter:
                    shorter: dict[int, dict] = {}
                    for score in scores:
                        same = to_the_same(posed, model, seed, goal, reached[score], score, shorter)
                        reached[score] |= {"to_the_same": same}
                rows.append(row | {"anvi": goal, "reached": reached, "looks": looks})
                print(f"{name}, {model}, seed {seed}: {reached}", flush=True)
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
