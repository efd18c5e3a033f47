"""Write how far anvi is from scvi-tools, configuration by configuration (largest relative differences)::

    PYTHONPATH=tests python -m golden.table

An entry is the largest difference of an array relative to its largest entry, and the worst array is named. Gradients
that are zero but for rounding (biases in front of a batch norm) are counted as far as they exceed 1e-5.
"""

import sys

import torch
from golden.compare import NAMES, Comparison, compare


def row(name: str, found: Comparison) -> str:
    """One line of the table."""
    gradients = {
        key: float(((ours - theirs).abs() - 1e-5).max().clamp(min=0) / theirs.abs().max().clamp(1e-30))
        for key, (ours, theirs) in found.gradients.items()
    }
    cells = [name]
    for part in (found.outputs, found.terms, {"": found.loss}, gradients, found.running):
        worst = max(part, key=part.get, default=None)
        cells.append("-" if worst is None else f"{part[worst]:.1e} {worst}".strip())
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """All configurations."""
    torch.set_num_threads(1)
    head = ("configuration", "outputs", "terms", "loss", "gradients beyond 1e-5", "running statistics")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(row(name, compare(name)) for name in NAMES)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
