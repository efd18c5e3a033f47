"""Time of mapping 10,000 query cells of new batches onto a reference, and what it does to the labels.

    python benchmarks/mapping.py --model totalanvi

Simulated cells: two batches are the reference, five others the query.
"""

import argparse
import time
import warnings

import torch

import anvi as av


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("scanvi", "totalanvi"), default="totalanvi")
    parser.add_argument("--cells", type=int, default=14_000, help="of seven batches, two of which are the reference")
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    av.settings.progress = False
    av.settings.verbosity = 0
    mdata = av.datasets.synthetic_cite(
        options.cells, n_genes=options.genes, n_batches=7, rna_only_batch=False, labeled_fraction=0.5
    )
    known = mdata.obs["batch"].isin(["batch_0", "batch_1"])
    reference, query = mdata[known].copy(), mdata[~known].copy()
    begun = time.process_time()
    getattr(av.tl, options.model)(reference, batch_key="batch", max_epochs=20)
    fit_seconds = time.process_time() - begun
    print(f"fit of {reference.n_obs} cells, 20 epochs: {fit_seconds:.1f} s of processor time")
    for max_epochs in (None, 0):
        begun = time.process_time()
        mapped = av.tl.map_query(query, reference, max_epochs=max_epochs, copy=True)
        seconds = time.process_time() - begun
        part = mapped if options.model == "totalanvi" else mapped["rna"]
        predicted, truth = part.obs[f"{options.model}_prediction"].astype(str), query.obs["true_cell_type"].astype(str)
        print(
            f"{query.n_obs} cells mapped, {len(av.get.history(mapped))} epochs: {seconds:.1f} s, "
            f"{seconds / fit_seconds:.2f} of the fit; {(predicted == truth).mean():.4f} of the labels are right"
        )


if __name__ == "__main__":
    main()
