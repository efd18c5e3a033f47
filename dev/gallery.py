"""Draw every plot on real data, light and dark, into docs/figures: the pictures of docs/gallery.md.

python dev/gallery.py [--fitted FILE.h5mu] [--keep FILE.h5mu] [--only NAME ...] [--out FOLDER]

Needs `av.datasets.pbmc_cite()` (or ANVI_DATA_DIR); a fit and all questions take about fifteen minutes on two cores.
`--fitted` takes what an earlier run kept. `--colour-blind` also writes what people with protanopia, deuteranopia and
tritanopia see (Machado et al. 2009, full severity), to be looked at and not to be shipped.
"""

# ruff: noqa: T201
import argparse
import io
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import mudata
import numpy as np
import scanpy as sc
from matplotlib import pyplot as plt
from PIL import Image

import anvi as av

CLASSES = ["B Naive", "CD8 Naive", "NK"]
PLOTS = {
    "predictions": lambda m, **o: av.pl.predictions(m, **o),
    "embedding": lambda m, **o: av.pl.embedding(
        m, "umap", ["totalanvi_label", "totalanvi_prot_denoised:CD4", "prot:CD4", "rna:MS4A1"], **o
    ),
    "confusion": lambda m, **o: av.pl.confusion(m, **o),
    "calibration": lambda m, **o: av.pl.calibration(m, **o),
    "history": lambda m, **o: av.pl.history(m, **o),
    "panels": lambda m, **o: av.pl.panels(m, **o),
    "foreground": lambda m, **o: av.pl.foreground(m, proteins=["CD19", "CD4", "CD8a", "CD14"], **o),
    "criticism": lambda m, **o: av.pl.criticism(m, **o),
    "correlation": lambda m, **o: av.pl.correlation(m, **o),
    "volcano": lambda m, **o: av.pl.differential_expression(m, "B Naive", **o),
    "volcanoes": lambda m, **o: av.pl.differential_expression(m, **o),
    "de_dots": lambda m, **o: av.pl.differential_expression(m, kind="dot", n_features=2, **o),
    "attributions": lambda m, **o: av.pl.attributions(m, **o),
    "attribution_bars": lambda m, **o: av.pl.attributions(m, CLASSES, kind="bar", **o),
    "attribution_dots": lambda m, **o: av.pl.attributions(m, kind="dot", n_features=2, **o),
}
STYLES = {"light": "default", "dark": "dark_background"}
WIDTH = 1_100  # pixels at the most
# linear RGB to what is seen, Machado, Oliveira and Fernandes 2009, severity 1
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def fitted() -> mudata.MuData:
    """The 10x PBMC with everything that plots read."""
    mdata = av.datasets.pbmc_cite()
    av.tl.totalanvi(mdata, batch_key="batch")
    sc.pp.neighbors(mdata, use_rep="X_totalanvi")
    sc.tl.umap(mdata)
    av.tl.denoise(mdata, modality="prot")
    av.tl.foreground(mdata)
    av.tl.differential_expression(mdata, "cell_type", n_samples=2_000)
    av.tl.attributions(mdata, n_cells=40)
    av.tl.feature_correlation(mdata, n_cells=2_000, n_samples=2)
    av.metrics.criticism(mdata, n_samples=2)
    return mdata


def drawn(plot, mdata: mudata.MuData, style: str) -> Image.Image:
    """A plot as an image of the width of a page."""
    with plt.style.context(STYLES[style]):
        fig, file = plot(mdata, return_fig=True), io.BytesIO()
        fig.savefig(file, dpi=130, bbox_inches="tight")
        plt.close("all")
    image = Image.open(file).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    return image


def seen_by(image: Image.Image, matrix: list[list[float]]) -> Image.Image:
    """What somebody sees to whom a kind of cone is missing."""
    srgb = np.asarray(image, dtype=float) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ np.array(matrix).T
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * srgb).round().astype(np.uint8))


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fitted", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", nargs="+", choices=PLOTS, default=list(PLOTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "figures")
    parser.add_argument("--colour-blind", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    mdata = fitted() if options.fitted is None else mudata.read(options.fitted)
    if options.keep is not None:
        mdata.write(options.keep)
    for name in options.only:
        for style in STYLES:
            image = drawn(PLOTS[name], mdata, style)
            path = options.out / f"gallery_{name}_{style}.png"
            image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
            if options.colour_blind is not None and style == "light":
                for kind, matrix in SEEN.items():
                    seen_by(image, matrix).save(options.colour_blind / f"{name}_{kind}.png")


if __name__ == "__main__":
    main()
