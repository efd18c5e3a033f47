"""From terms to weights: the one training loop and what belongs to it.

::

    plan     options of a fit, warm-up and learning rate
    start    first weights and priors, also of the protein background; starting from a fitted model
    loop     the one training loop, with its checkpoints
    step     one step of it: cells in, an update of network and adversary out; input augmentation
    ranks    several processes: their shares of a step, and what they add up
    graph    the same step as a CUDA graph
    surgery  rows for new batches, trained while all else stays
"""
