"""Freshly trained scvi-tools models of the real file, opened here: the same latent and probabilities for every cell.

Skipped where scvi-tools is not installed; run it in an environment that has both:
`ANVI_DATA_DIR=... python -m pytest tests/test_scvi_tools_side_by_side.py -s`.
"""

import os
from pathlib import Path

import mudata
import numpy as np
import pytest
from helpers import quiet_mudata

import anvi as av

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
FILE = Path(os.environ.get("ANVI_DATA_DIR", "")) / "pbmc_citeseq.h5mu"
pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(not FILE.is_file(), reason="ANVI_DATA_DIR has no pbmc_citeseq.h5mu"),
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]


def paired() -> mudata.MuData:
    """The file as scvi-tools needs it: every cell in both modalities, zeros where nothing was measured."""
    with quiet_mudata():
        mdata = mudata.read_h5mu(FILE)
        rna = mdata["rna"].copy()
        proteins = mdata["prot"].to_df().reindex(rna.obs_names).fillna(0).astype(np.float32)
        import anndata

        rna.obs = mdata.obs.loc[rna.obs_names, ["batch", "cell_type"]].copy()
        return mudata.MuData({"rna": rna, "prot": anndata.AnnData(proteins, obs=rna.obs.copy())})


def train(name: str, mdata: mudata.MuData):
    """One epoch of the peer, saved; its latent and probabilities."""
    mods = {"rna_layer": "rna", "protein_layer": "prot", "batch_key": "rna", "labels_key": "rna"}
    if name == "scvi":
        scvi.model.SCVI.setup_anndata(mdata["rna"], batch_key="batch")
        model = scvi.model.SCVI(mdata["rna"])
    elif name == "scanvi":
        scvi.model.SCANVI.setup_anndata(mdata["rna"], "cell_type", "Unknown", batch_key="batch")
        model = scvi.model.SCANVI(mdata["rna"])
    elif name == "totalvi":
        del mods["labels_key"]
        scvi.model.TOTALVI.setup_mudata(mdata, rna_layer=None, protein_layer=None, batch_key="batch", modalities=mods)
        model = scvi.model.TOTALVI(mdata)
    else:
        scvi.external.TOTALANVI.setup_mudata(
            mdata,
            rna_layer=None,
            protein_layer=None,
            batch_key="batch",
            labels_key="cell_type",
            unlabeled_category="Unknown",
            modalities=mods,
        )
        model = scvi.external.TOTALANVI(mdata)
    model.train(max_epochs=1)
    proba = model.predict(soft=True) if name.endswith("anvi") else None
    return model, model.get_latent_representation(), proba


@pytest.mark.parametrize("name", ["scvi", "scanvi", "totalvi", "totalanvi"])
def test_all_cells_agree(name, tmp_path):
    scvi.settings.seed = 0
    mdata = paired()
    model, latent, proba = train(name, mdata)
    model.save(tmp_path / "model")
    opened = av.io.from_scvi_tools(tmp_path / "model")
    data = mdata["rna"] if name in ("scvi", "scanvi") else mdata
    ours = av.tl.latent(data, model=opened, inplace=False)
    difference = np.abs(ours - latent).max()
    print(f"{name}: latent of {len(ours)} cells, largest difference {difference:.1e}")  # noqa: T201
    # 1e-4 of latents of order one: float32 sums over 4,000 genes in another order
    assert difference < 1e-4
    if proba is not None:
        theirs = proba.loc[:, list(opened.classes)]
        mine = av.tl.predict(data, model=opened, inplace=False).reindex(theirs.index)
        difference = np.abs(mine.to_numpy() - theirs.to_numpy()).max()
        print(f"{name}: probabilities, largest difference {difference:.1e}")  # noqa: T201
        assert difference < 1e-4
