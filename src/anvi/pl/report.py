"""pl.report."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from anvi._backed import on_file_to_look_at
from anvi._data import slots
from anvi._data.containers import Data
from anvi._data.fits import Fit, resolve_fit
from anvi._data.predictions import expected_error
from anvi._files import write_bytes

from .calibration import calibration
from .confusion import confusion
from .criticism import criticism
from .history import history
from .panels import panels
from .predictions import predictions

ECE_LIMIT = 0.05
UNASSIGNED_LIMIT = 0.2
RECALL_LIMIT = 0.5
GAIN_LIMIT = 0.002


class Finding(NamedTuple):
    """One thing that was looked at."""

    verdict: str  # "pass", "warn", "fail" or "unknown"
    what: str
    found: str


class Page(str):
    """A page as text, which does not show itself in full where it is the last thing of a cell or line."""

    def __repr__(self) -> str:
        return f"<report as HTML, {len(self) / 1000:,.0f} kB: give a path, or write it with open(..., 'w').write(...)>"


@on_file_to_look_at
def report(data: Data, path: str | Path | None = None, *, model: str | None = None, overwrite: bool = False) -> str:
    """One page about a fit: what was fitted, what to look at, and every picture that the slots allow.

    The page is a single HTML file without scripts, with its pictures inside; it opens in any browser and needs no
    network. Checks that were not run (`metrics.criticism`) or do not apply are left out.

    Parameters
    ----------
    data
        The fitted object.
    path
        Where the page is written; None: nowhere.
    model
        Key of the fit; None: the only one there.
    overwrite
        Whether a file that is there may be replaced.

    Returns
    -------
    The page as text, a str whose repr is short.

    Raises
    ------
    KeyError
        If nothing was fitted.
    ValueError
        If there are several fits and none is named.
    FileExistsError
        If the file is there and `overwrite` is False.
    FileNotFoundError
        If there is no such folder.

    Notes
    -----
    Reads `uns[key]` and the slots of predictions, history, panels, calibration and criticism.

    Examples
    --------
    >>> import anvi as av
    >>> mdata = av.datasets.synthetic_cite(300, n_genes=60)
    >>> av.tl.totalanvi(mdata, max_epochs=2)
    >>> page = av.pl.report(mdata)
    >>> page[:15]
    '<!doctype html>'
    """
    fit = resolve_fit(data, model)
    path = None if path is None else Path(path).expanduser()
    if path is not None and path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; pass overwrite=True to replace it.")
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write the page into.")
    pictures = [_figure(data, fit.key, *picture) for picture in _pictures(fit).items()]
    sections = [_facts(fit), _lines(checks(fit)), *pictures]
    title = html.escape(f"{fit.key}: report of a fit")
    page = PAGE.format(title=title, style=STYLE, body="\n".join(sections))
    if path is not None:
        write_bytes(path, page.encode("utf-8"))
    return Page(page)


# what was looked at -----------------------------------------------------------------------------------------------
def checks(fit: Fit) -> list[Finding]:
    """Everything that the slots of a fit let one judge."""
    found = _training(fit)
    if fit.setup.get("classes"):
        found += [*_labels(fit), *(line for level in fit.levels.coarser for line in _labels(fit, level))]
        found += _confidence(fit)
    verdicts = fit.home.uns[fit.key].get("criticism", {}).get("verdict")
    if verdicts is not None:
        for row in verdicts.itertuples():
            what = f"{row.modality}: {row.metric} {row.statistic}, {row.cells} cells"
            found.append(Finding(str(row.verdict), what, f"{row.value:.3g} ({row.threshold}; {row.source})"))
    return found


def _training(fit: Fit) -> list[Finding]:
    table = fit.stored("history")
    if "validation_loss" not in table or not len(table):
        return [Finding("unknown", "length of the training", "no validation cells to judge it by")]
    loss, n = table["validation_loss"].to_numpy(dtype=float), len(table)
    best = int(np.argmin(loss))
    # rates end near zero, so that the last epoch is the best of most runs: what counts is how much it still gained
    gain = float(loss[: max(1, n - max(1, n // 10))].min() - loss[best]) / abs(float(loss[best]))
    last, ended = best == n - 1 and n > 1, fit.home.uns[fit.key].get("params", {}).get("ended")
    text = f"best epoch {best + 1} of {n}, the last tenth of the run gained {max(gain, 0.0):.2%}"
    if ended is not None:
        text += f"; ended early by {ended}"
    elif last and gain > GAIN_LIMIT:
        text += f": may gain from more, e.g. max_epochs={2 * n}"
    lines = [Finding("warn" if last and gain > GAIN_LIMIT else "pass", "length of the training", text)]
    gap = float(table["train_elbo"].iloc[best] - table["validation_elbo"].iloc[best])
    share = gap / abs(float(table["validation_elbo"].iloc[best]))
    verdict = "pass" if share < 0.05 else "warn"
    side = "below" if gap > 0 else "above"
    text = f"the bound of validation cells is {abs(gap):.1f} nats ({abs(share):.1%}) {side} that of training cells"
    return [*lines, Finding(verdict, "overfitting", text)]


def _labels(fit: Fit, level: str | None = None) -> list[Finding]:
    labels, at = fit.own_labels(level), "" if level is None else f" ({level})"
    if labels is None or slots.split(fit.key) not in fit.home.obs:  # of a mapping
        return [Finding("unknown", f"labels{at}", "no labelled validation cells")]
    labels = labels.astype(object)
    frame = pd.DataFrame({"true": labels, "predicted": fit.prediction(level).astype(object)})
    split = fit.split().to_numpy()
    frame = frame[(split == "validation") & frame["true"].notna().to_numpy() & frame["predicted"].notna().to_numpy()]
    if not len(frame):
        return [Finding("unknown", f"labels{at}", "no labelled validation cells")]
    right = frame["true"] == frame["predicted"]
    recall = right.groupby(frame["true"]).mean()
    poor = [f"{name} ({value:.2f})" for name, value in recall.sort_values().items() if value < RECALL_LIMIT]
    text = f"accuracy {right.mean():.3f}, mean recall {recall.mean():.3f} over {len(frame):,} validation cells"
    lines = [Finding("pass" if right.mean() >= 0.8 else "warn", f"labels{at}", text)]
    found = ", ".join(poor) if poor else f"no class is found in less than {RECALL_LIMIT:.0%} of its cells"
    return [*lines, Finding("warn" if poor else "pass", f"recall of every class{at}", found)]


def _confidence(fit: Fit) -> list[Finding]:
    lines, table = [], fit.home.uns[fit.key].get("calibration")
    params = fit.home.uns[fit.key].get("params", {})
    if table is None and "temperature" in params:
        text = "confidence is calibrated as in the reference; not checked on these cells"
        lines.append(Finding("unknown", "calibration", text))
    elif table is None:
        lines.append(Finding("warn", "calibration", "too few labelled validation cells: confidence is not calibrated"))
    else:
        table = table.assign(level="") if "level" not in table else table
        for (level, kind), part in table.groupby(["level", "cells_seen"], observed=True, sort=False):
            error = {when: expected_error(some) for when, some in part.groupby("when", observed=True)}
            verdict = "pass" if error["after"] <= ECE_LIMIT else "warn"
            text = f"error {error['after']:.3f} (before {error['before']:.3f}) on cells thinned as queries are"
            at = f"{level}, " if level else ""
            lines.append(Finding(verdict, f"calibration, {at}cells {str(kind).replace('_', ' ')}", text))
    column = slots.label(fit.key)
    if column in fit.home.obs:
        labels = fit.own_labels()
        asked = np.ones(len(fit.home.obs), dtype=bool) if labels is None else labels.isna().to_numpy()
        share = float((fit.home.obs[column].astype(object) == slots.UNASSIGNED)[asked].mean())
        if np.isfinite(share):
            verdict = "pass" if share <= UNASSIGNED_LIMIT else "warn"
            lines.append(Finding(verdict, "cells of no known type", f"{share:.1%} of the cells without a label"))
    return lines


# the page ---------------------------------------------------------------------------------------------------------
def _pictures(fit: Fit) -> dict[str, Callable]:
    """The plots of the page by their titles."""
    pictures: dict[str, Callable] = {"Course of the fit": history}
    if fit.setup.get("classes"):
        pictures |= {"Predictions": predictions, "Validation cells": confusion}
        pictures |= {f"Validation cells, {level}": partial(confusion, level=level) for level in fit.levels.coarser}
        if "calibration" in fit.home.uns[fit.key]:
            pictures["Does confidence mean what it says?"] = calibration
    if fit.joint:
        pictures["Who measured which protein"] = panels
    if "criticism" in fit.home.uns[fit.key]:
        pictures["Drawn counts beside the data"] = criticism
    return pictures


def _figure(data: Data, key: str, title: str, draw: Callable) -> str:
    """A section with a picture, or the reason why there is none."""
    from matplotlib import pyplot as plt

    title = html.escape(title)
    file, before = io.BytesIO(), plt.get_fignums()
    try:
        fig = draw(data, model=key, return_fig=True)
        fig.savefig(file, format="png", dpi=110, bbox_inches="tight")
    except (KeyError, ValueError) as error:  # a slot was deleted, a name is no formula though it has two "$", ...
        return f"<h2>{title}</h2>\n<p class='none'>{html.escape(str(error.args[0]))}</p>"
    finally:
        for number in set(plt.get_fignums()) - set(before):
            plt.close(number)
    image = base64.b64encode(file.getvalue()).decode()
    return f"<h2>{title}</h2>\n<img alt='{title}' src='data:image/png;base64,{image}'>"


def _facts(fit: Fit) -> str:
    """What was fitted, as a table."""
    params = fit.home.uns[fit.key].get("params", {})
    names = ("method", "n_cells", "n_train", "n_labelled", "epochs", "seconds", "batch_key", "labels_key", "panel_key")
    names += ("random_state", "device", "anvi", "torch")
    rows = [(name, params[name]) for name in names if params.get(name) not in (None, "")]
    features = fit.home.uns[fit.key].get("features", {})
    rows += [(f"features of {mod}", f"{len(found):,}") for mod, found in features.items()]
    body = "".join(f"<tr><th>{html.escape(str(a))}</th><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<h1>{html.escape(fit.key)}</h1>\n<table>{body}</table>"


def _lines(lines: list[Finding]) -> str:
    rows = "".join(
        f"<tr><td><span class='{verdict}'>{verdict}</span></td><th>{what}</th><td>{found}</td></tr>"
        for verdict, what, found in (map(html.escape, line) for line in lines)  # a file may be a stranger's
    )
    return f"<h2>Checks</h2>\n<table class='checks'>{rows}</table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { margin-bottom: .3em } h2 { margin-top: 1.6em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th { text-align: left; font-weight: 600 }
th, td { padding: .15em 1em .15em 0; vertical-align: top }
img { max-width: 100% } .none { color: #777 }
.checks span { color: #fff; border-radius: 3px; padding: 0 .5em; font-size: .85em }
.pass { background: #1b7837 } .warn { background: #b35806 } .fail { background: #b2182b } .unknown { background: #777 }
"""
