"""Write expected.npz and expected.json: scvi-tools' criticism of given counts and draws.

scvi-tools is needed here and nowhere else; in an environment with scvi-tools==1.5.0.post1::

    python tests/golden/criticism/make.py
"""

import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import pearsonr, spearmanr
from scvi.criticism import PosteriorPredictiveCheck
from sklearn.metrics import mean_absolute_error, r2_score
from sparse import GCXS

FOLDER = Path(__file__).parent
N_CELLS, N_GENES, N_SAMPLES = 150, 60, 4


def arrays() -> dict[str, np.ndarray]:
    """Three groups with genes of their own, draws that follow them too weakly and a little too low, two splits."""
    rng = np.random.default_rng(0)
    group = rng.choice(3, N_CELLS, p=[0.5, 0.3, 0.2])
    rate = rng.gamma(1.0, 2.0, N_GENES) + 0.05
    fold = np.ones((3, N_GENES))
    for code in range(3):
        fold[code, 6 * code : 6 * code + 6] = 4
    depth = rng.gamma(10, 0.1, (N_CELLS, 1))
    x = rng.poisson(rng.gamma(2.0, 0.5, (N_CELLS, N_GENES)) * rate * fold[group] * depth)
    noise = rng.gamma(3.0, 1 / 3, (N_SAMPLES, N_CELLS, N_GENES))
    draws = rng.poisson(0.9 * noise * rate * np.sqrt(fold[group]) * depth)
    x[:, -1] = 0  # a gene that no cell has, but some draws
    split = (rng.random(N_CELLS) < 0.2).astype(int)
    small = {"x": x, "draws": draws, "group": group, "split": split}
    return {name: value.astype(np.uint16) for name, value in small.items()}


def check(x: np.ndarray, draws: np.ndarray, group: np.ndarray) -> PosteriorPredictiveCheck:
    """scvi-tools' check, with a model that answers with the given draws."""
    obs = pd.DataFrame({"group": pd.Categorical.from_codes(group, ["a", "b", "c"])})
    adata = AnnData(x.astype(np.float32), obs=obs.set_axis(obs.index.astype(str)))
    sampled = GCXS.from_numpy(np.moveaxis(draws, 0, -1).astype(np.float32))
    model = SimpleNamespace(adata=adata, posterior_predictive_sample=lambda *args, **kwargs: sampled)
    # the calibration reads a model of this name, whatever the models are called
    return PosteriorPredictiveCheck(adata, {"model1": model}, n_samples=len(draws))


def numbers(x: np.ndarray, draws: np.ndarray, group: np.ndarray, split: np.ndarray) -> dict:
    """Its metrics, with as many digits as there are; the tables as its report puts them together."""
    made = check(x, draws, group)
    found: dict = {}
    for what, dim in (("cv_cell", "features"), ("cv_gene", "cells")):
        made.coefficient_of_variation(dim)
        table = made.metrics[what]
        model, raw = table["model1"].to_numpy(), table["Raw"].to_numpy()
        parts = (
            {"train": split == 0, "validation": split == 1} if what == "cv_cell" else {"all": np.full(len(raw), True)}
        )
        found[what] = {
            name: {
                "mae": mean_absolute_error(model[here], raw[here]),
                "pearson": pearsonr(model[here], raw[here])[0],
                "spearman": spearmanr(model[here], raw[here])[0],
                "r2": r2_score(model[here], raw[here]),
            }
            for name, here in parts.items()
        }
    made.zero_fraction()
    zero = made.metrics["zero_fraction"]
    found["zero_fraction"] = {"model": zero["model1"].tolist(), "data": zero["Raw"].tolist()}
    made.calibration_error()
    found["calibration"] = float(made.metrics["calibration"].loc["features", "model1"])
    compare = inspect.unwrap(PosteriorPredictiveCheck.differential_expression)  # without leidenalg: groups are given
    compare(made, de_groupby="group", p_val_thresh=0.2)
    summary = made.metrics["diff_exp"]["summary"].drop(columns="model").sort_values("n_cells", ascending=False)
    found["de"] = json.loads(summary.to_json(orient="records", double_precision=15))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    given = arrays()
    np.savez_compressed(FOLDER / "given.npz", **given)
    text = json.dumps(numbers(**given), indent=1, default=float)
    (FOLDER / "expected.json").write_text(text + "\n")
