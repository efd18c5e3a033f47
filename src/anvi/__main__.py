"""python -m anvi: `demo` shows the main job on made-up data with known truth, `check` looks at a file before a fit."""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m anvi", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser(
        "demo", help="simulate CITE-seq with two panels, fit TotalANVI, score it, draw it"
    )
    demo_parser.add_argument(
        "--out", type=Path, default=Path("anvi-demo"), help="folder for the .h5mu and the pictures"
    )
    demo_parser.add_argument("--cells", type=int, default=2_000, help="cells to simulate")
    demo_parser.add_argument("--epochs", type=int, default=60, help="longest fit, in epochs")
    check_parser = commands.add_parser("check", help="say what a fit would make of a .h5mu file")
    check_parser.add_argument("file", type=Path)
    check_parser.add_argument("--labels-key", default="cell_type")
    check_parser.add_argument("--batch-key", default=None)
    check_parser.add_argument("--panel-key", default=None)
    options = parser.parse_args(arguments)
    if options.command == "demo":
        return demo(options.out, options.cells, options.epochs)
    return check(options.file, options.labels_key, options.batch_key, options.panel_key)


def check(file: Path, labels_key: str, batch_key: str | None, panel_key: str | None) -> int:
    """Print what :func:`anvi.pp.check` finds; 0 if a fit would start, 1 if not, 2 if there is no such file."""
    import mudata

    import anvi as av

    if not file.exists():
        print(f"anvi: there is no file {file}", file=sys.stderr)
        return 2
    report = av.pp.check(mudata.read(file), labels_key=labels_key, batch_key=batch_key, panel_key=panel_key)
    print(report)
    return 0 if report.ok else 1


def demo(out: Path, n_cells: int, max_epochs: int) -> int:
    """The main job from start to end, on data whose truth is known."""
    import matplotlib

    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=FutureWarning, module="mudata")  # about columns it will not pull up
    import scanpy as sc

    import anvi as av

    begun = time.monotonic()
    mdata = av.datasets.synthetic_cite(n_cells)
    print("Simulated CITE-seq: three batches, two antibody panels (one lacks a quarter of the proteins), one batch")
    print("without any protein and without labels; half of the other cells are labelled.\n")
    print(mdata, "\n")
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=max_epochs)

    print("\nWritten into the MuData:")
    for slot in _slots(mdata):
        print(f"  {slot}")
    print("\nHow well was the truth recovered? (in brackets: the same score with the truth shuffled)")
    for line in _scores(mdata):
        print(f"  {line}")

    sc.pp.neighbors(mdata, use_rep="X_totalanvi")
    sc.tl.umap(mdata)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "predictions": lambda: av.pl.predictions(mdata, show=False, return_fig=True),
        "history": lambda: av.pl.history(mdata, show=False, return_fig=True),
        "confusion": lambda: av.pl.confusion(mdata, show=False, return_fig=True),
        "panels": lambda: av.pl.panels(mdata, show=False, return_fig=True),
    }
    for name, draw in pictures.items():
        draw().savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")
    mdata.write(out / "demo.h5mu")
    print(f"\nIn {out}/: demo.h5mu, {', '.join(f'{name}.png' for name in pictures)}")
    print(f"Done in {time.monotonic() - begun:.0f} s.")
    return 0


def _slots(mdata) -> list[str]:
    slots = [f"obs['{name}']" for name in mdata.obs if name.startswith("totalanvi")]
    slots += [f"obsm['{name}']" for name in mdata.obsm if "totalanvi" in name]
    return slots + [f"uns['{name}']" for name in mdata.uns if name.startswith("totalanvi")]


def _scores(mdata) -> list[str]:
    """Labels, foreground and hidden proteins against the truth, each beside a shuffled control."""
    from sklearn.metrics import roc_auc_score

    import anvi as av
    from anvi._data.cells import read_cells
    from anvi._posterior.decode import read_proteins

    rng = np.random.default_rng(0)
    model = av.get.model(mdata)
    cells = read_cells(mdata, model.setup)
    readout = read_proteins(model, cells)
    obs = mdata.obs.loc[cells.names]
    truth, predicted = obs["true_cell_type"].to_numpy(str), obs["totalanvi_prediction"].to_numpy(str)
    unlabelled = (obs["cell_type"] == "Unknown").to_numpy()
    rna_only = (obs["panel"] == "none").to_numpy()
    lines = []
    for what, chosen in (("unlabelled cells", unlabelled), ("RNA-only batch", rna_only)):
        right, chance = (predicted == truth)[chosen].mean(), (predicted == rng.permutation(truth))[chosen].mean()
        lines.append(f"accuracy of labels, {what}: {right:.3f} ({chance:.3f})")
    foreground = mdata.obsm["true_foreground"].loc[cells.names].to_numpy() > 0
    auroc = roc_auc_score(foreground.ravel(), readout.foreground.ravel())
    chance = roc_auc_score(rng.permutation(foreground.ravel()), readout.foreground.ravel())
    lines.append(f"AUROC of protein foreground, all cells: {auroc:.3f} ({chance:.3f})")
    hidden = ~cells.measured.numpy()
    counts = np.log1p(mdata.obsm["true_protein_counts"].loc[cells.names].to_numpy())
    imputed = np.log1p(readout.rate)
    pairs = [(imputed[rows, j], counts[rows, j]) for j, rows in enumerate(hidden.T)]
    pearson = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    chance = np.mean([np.corrcoef(a, rng.permutation(b))[0, 1] for a, b in pairs])
    lines.append(f"mean Pearson correlation of hidden proteins (log1p): {pearson:.3f} ({chance:.3f})")
    return lines


if __name__ == "__main__":
    sys.exit(main())
