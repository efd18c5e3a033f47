"""Where the prior of the protein background starts: a two-component mixture per cell, all cells at once.

Source: spec section 3.5 (there: one scikit-learn fit per cell, 100 random cells per panel, in a Python loop).
"""

import torch
from torch import Tensor


def lower_component(values: Tensor, measured: Tensor, n_iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Fit a two-component normal mixture to the values of each row by expectation maximisation.

    Parameters
    ----------
    values
        `(cells, proteins)`, log1p counts.
    measured
        `(cells, proteins)` bool; at least two per row.
    n_iterations
        Steps of EM.

    Returns
    -------
    Mean and standard deviation of the component with the lower mean `(cells,)`.
    """
    mask = measured.to(values.dtype)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean_all = (values * mask).sum(1, keepdim=True) / count
    # start: below and above the mean, which is one step of two-means
    upper = ((values > mean_all) & measured).to(values.dtype)
    responsibility = torch.stack([mask - upper, upper], dim=-1)  # (cells, proteins, 2)
    for _ in range(n_iterations):
        size = responsibility.sum(1) + 1e-10  # (cells, 2)
        mean = (responsibility * values[..., None]).sum(1) / size
        var = (responsibility * (values[..., None] - mean[:, None]).square()).sum(1) / size + 1e-6
        share = size / count
        log_joint = share.log()[:, None] - 0.5 * (
            var.log()[:, None] + (values[..., None] - mean[:, None]).square() / var[:, None]
        )
        responsibility = log_joint.softmax(-1) * mask[..., None]
    # a component that nothing belongs to has no mean
    lower = mean.masked_fill(size < 1e-3, float("inf")).argmin(1, keepdim=True)
    return mean.gather(1, lower).squeeze(1), var.gather(1, lower).squeeze(1).sqrt()


def background_prior(
    y: Tensor, measured: Tensor, panel: Tensor, n_panels: int, generator: torch.Generator, n_sampled: int = 1_000
) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation at which the prior of log background starts, per panel.

    A panel with fewer than 5 measured proteins in every cell takes the average of the other panels.

    Parameters
    ----------
    y, measured
        Protein counts and mask `(cells, proteins)`.
    panel
        Panel codes `(cells,)`.
    n_panels
        Number of panels.
    generator
        CPU generator that picks the cells.
    n_sampled
        Cells looked at per panel.

    Returns
    -------
    Two tensors `(panels,)`.
    """
    mean = torch.full((n_panels,), float("nan"))
    log_scale = torch.full((n_panels,), float("nan"))
    enough = measured.sum(1) >= 5
    for code in range(n_panels):
        cells = ((panel == code) & enough).nonzero().squeeze(1)
        if len(cells) < 5:
            continue
        cells = cells[torch.randperm(len(cells), generator=generator)[:n_sampled]]
        means, scales = lower_component(y[cells].log1p(), measured[cells])
        mean[code] = means.mean()
        # the published start is a tenth of this, which lets the divergence of the background drown all else at first
        log_scale[code] = scales.square().mean().sqrt().log()
    if mean.isnan().all():
        return torch.full((n_panels,), 3.0), torch.zeros(n_panels)
    return mean.nan_to_num(float(mean.nanmean())), log_scale.nan_to_num(float(log_scale.nanmean()))
