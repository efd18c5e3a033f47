"""Write how far anvi is from scvi-tools, configuration by configuration::

    PYTHONPATH=tests python -m golden.table

An entry is the largest difference in an array, relative to the array's largest entry, of the worst array, which is
named. Gradients, some of which are zero but for rounding, are given as the used share of what `test_parity.py` allows.
"""

import sys

import torch
from golden.compare import NAMES, Comparison, allowed, compare


def row(name: str, found: Comparison) -> str:
    """One line of the table."""
    gradients = {
        key: float((ours - theirs).abs().max() / allowed(theirs)) for key, (ours, theirs) in found.gradients.items()
    }
    cells = [name]
    for part, form in (
        (found.outputs, ".1e"),
        (found.terms, ".1e"),
        ({"": found.loss}, ".1e"),
        (gradients, ".0%"),
        (found.running, ".1e"),
    ):
        worst = max(part, key=part.get, default=None)
        cells.append("-" if worst is None else f"{part[worst]:{form}} {worst}".strip())
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """All configurations."""
    torch.set_num_threads(1)
    head = ("configuration", "outputs", "terms", "loss", "gradients", "running statistics")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(row(name, compare(name)) for name in NAMES)]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
