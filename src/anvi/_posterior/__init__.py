"""Questions to a fitted model: model and cells in, arrays out, chunk by chunk on the device.

::

    encode        posterior of the latent vector, samples, class probabilities; cells in another batch
    expected      expected expression, foreground, parameters of the likelihoods
    imputation    proteins that a batch did not measure, from cells that were measured, with intervals
    predictive    counts and rates drawn from the model, and their correlation in bounded memory
    bound         the bound term by term, the likelihood by importance sampling, samples of the posterior
    confidence    calibration, conformal prediction sets, novelty, at every level of the labels
    differential  draws of populations, fold changes of pairs, expected false discoveries
    integrate     integrated gradients of class logits
    attribute     attributions cell by cell in blocks, their baselines, and their means by group
"""
