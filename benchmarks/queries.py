"""Time of questions to a fitted model beside scvi-tools: same data, same weights, same device, alternating in one run.

A model of scvi-tools is trained for a moment (speed does not depend on how well), saved, and opened with
`io.from_scvi_tools`, so that both sides answer the same question. Both are called as a user would: reading the counts
and building the answer count. How far the answers agree is printed beside the times, as a correlation for each
modality: of the answers themselves, or, where scvi-tools answers with a draw from the posterior, of their means over
cells. Needs scvi-tools 1.5 in the environment, which anvi itself does not::

    python benchmarks/queries.py --data pbmc_citeseq.h5mu --out benchmarks/results/queries_cpu.json

Without `--data` the counts are simulated (`--cells`, `--genes`, `--proteins`).
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mudata
import numpy as np
import torch
from anndata import AnnData
from mudata import MuData

import anvi as av

PEERS = {"scvi": "SCVI", "scanvi": "SCANVI", "totalvi": "TOTALVI", "totalanvi": "TOTALANVI"}
N_EXPLAINED = 500  # cells whose attributions are compared: integrated gradients take the time of many passes


class Sides(NamedTuple):
    """The same fitted model on both sides, and the data that it is asked about."""

    adata: AnnData
    peer: object  # a model of scvi-tools
    ours: av.Model
    options: argparse.Namespace

    @property
    def joint(self) -> bool:
        """Whether there are proteins."""
        return self.ours.config.has_protein

    @property
    def labelled(self) -> AnnData:
        """The cells whose type is known."""
        return self.adata[self.adata.obs["cell_type"] != "Unknown"].copy()


class Query(NamedTuple):
    """One question, asked on either side; both return arrays that can be compared."""

    name: str
    peer: Callable[[Sides], list[np.ndarray]]
    ours: Callable[[Sides], list[np.ndarray]]
    applies: Callable[[Sides], bool] = lambda sides: True
    drawn: bool = False  # the peer's answer is a draw: compared by its mean over cells


def _pair(answer) -> list[np.ndarray]:
    """What scvi-tools returns, as arrays: one, or one of genes and one of proteins."""
    return [np.asarray(part) for part in (answer if isinstance(answer, tuple) else (answer,))]


def _dataset(found) -> list[np.ndarray]:
    return [found[mod].values for mod in ("rna", "prot") if mod in found]


def some_genes(sides: Sides) -> list[str]:
    """Twenty genes, spread over all."""
    return list(sides.adata.var_names[:: max(1, sides.adata.n_vars // 20)][:20])


def latent() -> Query:
    """Posterior means."""
    return Query(
        "latent",
        lambda s: _pair(s.peer.get_latent_representation(s.adata)),
        lambda s: [av.tl.latent(s.adata, model=s.ours, inplace=False)],
    )


def predict() -> Query:
    """Class probabilities."""
    return Query(
        "predict",
        lambda s: _pair(s.peer.predict(s.adata, soft=True)),
        lambda s: [av.tl.predict(s.adata, model=s.ours, inplace=False).to_numpy()],
        lambda s: s.ours.config.has_labels,
    )


def denoise() -> Query:
    """Expected expression of all genes and proteins."""
    return Query(
        "denoise, all genes",
        lambda s: _pair(s.peer.get_normalized_expression(s.adata, return_numpy=True)),
        lambda s: _dataset(av.tl.denoise(s.adata, model=s.ours, inplace=False)),
        drawn=True,
    )


def denoise_some() -> Query:
    """Expected expression of twenty genes."""
    return Query(
        "denoise, 20 genes",
        lambda s: _pair(s.peer.get_normalized_expression(s.adata, gene_list=some_genes(s), return_numpy=True))[:1],
        lambda s: [av.tl.denoise(s.adata, model=s.ours, features=some_genes(s)).to_numpy()],
        drawn=True,
    )


def denoise_batches() -> Query:
    """Expected expression of all genes and proteins, averaged over all batches."""
    return Query(
        "denoise, mean of batches",
        lambda s: _pair(
            s.peer.get_normalized_expression(s.adata, transform_batch=list(s.ours.setup.batches), return_numpy=True)
        ),
        lambda s: _dataset(av.tl.denoise(s.adata, model=s.ours, transform_batch="all", inplace=False)),
        drawn=True,
    )


def foreground() -> Query:
    """Foreground probabilities of proteins."""
    return Query(
        "foreground",
        lambda s: _pair(s.peer.get_protein_foreground_probability(s.adata, return_numpy=True)),
        lambda s: [av.tl.foreground(s.adata, model=s.ours, inplace=False).to_numpy()],
        lambda s: s.joint,
        drawn=True,
    )


def posterior_predictive() -> Query:
    """One draw of every count."""

    def peer(s: Sides) -> list[np.ndarray]:
        drawn = s.peer.posterior_predictive_sample(s.adata, n_samples=1)
        parts = list(drawn.values()) if isinstance(drawn, dict) else [drawn]
        return [part.todense() if hasattr(part, "todense") else np.asarray(part) for part in parts]

    return Query(
        "posterior predictive",
        peer,
        lambda s: [a[0] for a in _dataset(av.tl.posterior_predictive(s.adata, model=s.ours))],
        drawn=True,
    )


def differential_expression() -> Query:
    """Every type against the rest, labelled cells, change mode, 5,000 pairs; mean log fold changes are compared."""
    options = {"mode": "change", "delta": 0.25, "batch_correction": False, "pseudocounts": 1e-5}

    def peer(s: Sides) -> list[np.ndarray]:
        found = s.peer.differential_expression(s.labelled, "cell_type", silent=True, **options)
        features = [s.ours.setup.genes]
        if s.joint:
            features.append([f"{name}_protein" for name in s.ours.setup.proteins])
        changes = {group: table["lfc_mean"] for group, table in found.groupby("group1")}
        return [np.array([changes[group].loc[names] for group in sorted(changes)]) for names in map(list, features)]

    def ours(s: Sides) -> list[np.ndarray]:
        found = av.tl.differential_expression(s.labelled, "cell_type", model=s.ours, inplace=False, **options)
        names = {"rna": s.ours.setup.genes, "prot": s.ours.setup.proteins}
        wide = {
            mod: table.pivot(index="group", columns="names", values="logfoldchanges") for mod, table in found.items()
        }
        return [wide[mod].sort_index()[list(names[mod])].to_numpy() for mod in wide]

    return Query("DE, each type and the rest", peer, ours)


def attributions() -> Query:
    """Integrated gradients of each cell's predicted class from no counts, 50 points; mean over cells is compared."""

    def peer(s: Sides) -> list[np.ndarray]:
        cells = s.adata[:N_EXPLAINED].copy()
        mean = s.peer.predict(cells, ig_interpretability=True)[1].set_index("feature")["attribution_mean"]
        mean = mean[~mean.index.duplicated()]  # it does not tell a gene from a protein of the same name
        return [mean.reindex(s.ours.setup.genes).to_numpy()]

    def ours(s: Sides) -> list[np.ndarray]:
        cells = s.adata[:N_EXPLAINED].copy()
        found = av.tl.attributions(cells, model=s.ours, baseline="zero", n_steps=50, n_cells=None, inplace=False)
        weight = found["n_cells"] / found["n_cells"].sum()
        return [(found["rna"].fillna(0) * weight).sum("class").values]

    return Query(f"attributions, {N_EXPLAINED} cells", peer, ours, lambda s: s.ours.config.has_labels)


QUERIES = (
    latent,
    predict,
    denoise,
    denoise_some,
    denoise_batches,
    foreground,
    posterior_predictive,
    differential_expression,
    attributions,
)


def to_peer(mdata: MuData) -> AnnData:
    """What scvi-tools takes: one AnnData, proteins as a dense table with zeros for cells that have none."""
    rna = mdata["rna"]
    adata = AnnData(rna.X.copy(), rna.obs[[]].copy(), rna.var[[]].copy())
    for column in ("batch", "cell_type"):
        adata.obs[column] = mdata.obs[column].astype(object).fillna("Unknown").astype(str).loc[rna.obs_names]
    adata.obsm["protein"] = mdata["prot"].to_df().reindex(rna.obs_names).fillna(0).astype(np.float32)
    return adata


def prepare(options: argparse.Namespace, folder: str) -> Sides:
    """Train the peer for a moment and open its model."""
    import scvi

    if options.data:
        mdata = mudata.read(options.data)
    else:
        mdata = av.datasets.synthetic_cite(options.cells, n_genes=options.genes, n_proteins=options.proteins)
    adata = to_peer(mdata)
    peer_class = getattr(scvi.model, PEERS[options.model], None) or getattr(scvi.external, PEERS[options.model])
    setup = {"batch_key": "batch"}
    if options.model.endswith("anvi"):
        setup |= {"labels_key": "cell_type", "unlabeled_category": "Unknown"}
    if options.model.startswith("total"):
        setup |= {"protein_expression_obsm_key": "protein"}
    peer_class.setup_anndata(adata, **setup)
    scvi.settings.seed = 0
    scvi.settings.progress_bar_style = "tqdm"
    peer = peer_class(adata)
    peer.train(max_epochs=options.epochs, accelerator=options.accelerator, enable_progress_bar=False)
    if options.peer_batch:
        scvi.settings.batch_size = options.peer_batch
    peer.save(folder, overwrite=True)
    return Sides(adata, peer, av.io.from_scvi_tools(folder), options)


def agreement(query: Query, one: list[np.ndarray], other: list[np.ndarray]) -> list[float]:
    """Correlation of two answers, for each modality."""

    def seen(x: np.ndarray) -> np.ndarray:
        return np.log1p(x.mean(0)) if query.drawn else x.ravel()

    return [float(np.corrcoef(seen(x), seen(y))[0, 1]) for x, y in zip(one, other, strict=True)]


def measure(query: Query, sides: Sides, repeats: int) -> dict:
    """Alternate both sides; the first round is not counted."""
    times = {"peer": [], "ours": []}
    answers = {}
    for round_ in range(repeats + 1):
        for side in ("peer", "ours"):
            if sides.options.accelerator == "gpu":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            answers[side] = getattr(query, side)(sides)
            if round_:
                times[side].append(time.perf_counter() - begun)
    ratios = [peer / ours for peer, ours in zip(times["peer"], times["ours"], strict=True)]
    return {
        "query": query.name,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "seconds": {side: statistics.median(taken) for side, taken in times.items()},
        "agreement": agreement(query, answers["peer"], answers["ours"]),
        "all_seconds": times,
    }


def machine(options: argparse.Namespace) -> dict:
    """Where and with what this was run."""
    names = ("anvi", "scvi-tools", "torch", "numpy")
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if options.accelerator == "gpu" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .h5mu file with rna, prot, batch and cell_type")
    parser.add_argument("--cells", type=int, default=5_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--proteins", type=int, default=20)
    parser.add_argument("--model", choices=PEERS, default="totalanvi")
    parser.add_argument("--epochs", type=int, default=1, help="of the peer's training")
    parser.add_argument("--peer-batch", type=int, default=0, help="cells per pass of the peer; 0: its default, 128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="*", choices=[query.__name__ for query in QUERIES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    av.settings.verbosity, av.settings.device = 0, "cuda" if options.accelerator == "gpu" else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sides = prepare(options, folder)
        torch.set_num_threads(options.threads)  # training may have changed it
        print(f"{options.model}, {sides.adata.n_obs} cells, {sides.adata.n_vars} genes; scvi-tools / anvi")
        for make in QUERIES:
            query = make()
            if (options.only and make.__name__ not in options.only) or not query.applies(sides):
                continue
            row = measure(query, sides, options.repeats)
            rows.append(row)
            ratio, seconds = row["ratio"], row["seconds"]
            agree = ", ".join(f"{value:.4f}" for value in row["agreement"])
            print(
                f"{query.name:26s} {ratio['median']:6.1f}x ({ratio['min']:.1f} to {ratio['max']:.1f})   "
                f"{seconds['peer']:7.2f} s / {seconds['ours']:6.2f} s   r = {agree}",
                flush=True,
            )
    if options.out is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        settings["data"] = options.data.name if options.data else None
        del settings["out"]
        result = {"options": settings, "machine": machine(options), "queries": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
