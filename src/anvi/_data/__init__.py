"""From the user's object to tensors and back: the only stage that knows MuData and AnnData.

::

    containers   modalities, layers, obs columns found in any obs
    antibodies   which antibody of one kit is which of another: names normalised, a table of synonyms
    counts       raw counts, checked: errors that name cell and feature; protein counts of a modality or of obsm
    labels       the levels of cell types, and the labels of the cells: where NaN becomes a cell without one
    setup        where things are, which categories there are, who measured which protein; JSON-able
    query        how a query is read for a model of other data: features by name, batches and panels added
    cells        all tensors of a data set, modalities joined by name
    batches      minibatches of fixed shape, class-balanced labelled cells, the split
    minified     what stands in for counts that `tl.minify` dropped
    select       features, batches, groups of cells and classes that a verb is asked about
    fits         the fits that lie in an object, found without torch
    predictions  what a model says of the cell types, in the slots; reliability of confidence
    rankings     features ranked by group: differential expression, attributions
    slots        every slot name and the one writer
"""
