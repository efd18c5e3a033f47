"""The prose of a model card: what each of the four models is, and what to cite for it."""

from typing import NamedTuple

from anvi._model import Model


class About(NamedTuple):
    """What there is to say of a model, whatever it was fitted to."""

    title: str
    text: str
    reference: str


_SHARED = (
    "Batches are part of the model, so that cells of different batches meet in the latent space, and new batches can "
    "be mapped onto it without training it again."
)

MODELS = {
    "scvi": About(
        "scVI model of RNA counts",
        "scVI explains the RNA counts of a cell by a latent vector, its batch and its library size, with a negative "
        f"binomial (with or without extra zeros) for every gene. {_SHARED}",
        "scVI: Lopez et al., Nature Methods 2018, https://doi.org/10.1038/s41592-018-0229-2",
    ),
    "scanvi": About(
        "scANVI model of RNA counts and cell types",
        "scANVI is scVI with cell types that are known for some cells: a classifier on the latent space learns from "
        f"these and gives every cell, also of other data, the probability of each type. {_SHARED}",
        "scANVI: Xu et al., Molecular Systems Biology 2021, https://doi.org/10.15252/msb.20209620",
    ),
    "totalvi": About(
        "totalVI model of RNA and protein counts",
        "totalVI explains RNA and surface protein counts of a cell by one latent vector and takes each protein count "
        "for a mixture of background and foreground. Cells may lack some proteins or all of them: the model fills them "
        f"in. {_SHARED}",
        "totalVI: Gayoso et al., Nature Methods 2021, https://doi.org/10.1038/s41592-020-01050-x",
    ),
    "totalanvi": About(
        "TotalANVI model of RNA counts, protein counts and cell types",
        "TotalANVI has totalVI's decoder of RNA and surface protein counts under scANVI's latent hierarchy with cell "
        "types that are known for some cells. It fills in proteins that were not measured and gives every cell, also "
        f"of data without proteins, the probability of each type. {_SHARED}",
        "Its parts: totalVI, Gayoso et al., Nature Methods 2021, https://doi.org/10.1038/s41592-020-01050-x, and "
        "scANVI, Xu et al., Molecular Systems Biology 2021, https://doi.org/10.15252/msb.20209620",
    ),
}


def usage(model: Model) -> str:
    """How the model is asked, as code that can be copied."""
    ask = "predict" if model.config.has_labels else "latent"
    lines = [
        "import anvi as av",
        "",
        'model = av.read_model("folder")  # of a hub: av.io.from_hub("owner/name")',
        f"av.tl.{ask}(data, model=model)  # the same batches",
        "av.tl.map_query(data, model)  # new batches, other genes or proteins",
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
