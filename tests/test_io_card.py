"""io.model_card: front matter that a hub reads, every number of the checks, nothing of any cell."""

import json
import re

import mudata
import pandas as pd
import pytest
from helpers import assert_same, cite, contents, quiet_mudata
from huggingface_hub import ModelCard

import anvi as av
from anvi.io._card import markdown_table

KEYS = ("scvi", "scanvi", "totalvi", "totalanvi")


def rows_below(card: str, title: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its header."""
    lines = card.split(f"\n{title}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| "))
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found[2:]


def block_below(card: str, title: str) -> dict:
    """The JSON below a heading."""
    return json.loads(re.search(rf"\n{title}\n\n```json\n(.*?)\n```", card, re.DOTALL).group(1))


@pytest.fixture(scope="module")
def checked():
    """A labelled model with checks, and the same tables apart."""
    with av.settings.override(progress=False, device="cpu", verbosity=0):
        mdata = cite(400)
        av.tl.totalanvi(mdata, batch_key="batch", panel_key="panel", max_epochs=2)
        av.metrics.criticism(mdata, n_samples=2)
    return mdata


@pytest.mark.parametrize("key", KEYS)
def test_front_matter_is_what_a_hub_reads(fitted, key):
    before = contents(fitted)
    text = av.io.model_card(fitted, key=key, license="cc-by-4.0", tissues=["blood", 'odd: "tissue"'])
    assert_same(contents(fitted), before)
    card = ModelCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "anvi"
    joint, labelled = "total" in key, key.endswith("anvi")
    assert {"biology", "genomics", "single-cell", f"model_cls_name:{key.upper()}", "modality:rna"} <= set(
        card.data.tags
    )
    assert {"tissue:blood", 'tissue:odd: "tissue"', f"anvi_version:{av.__version__}"} <= set(card.data.tags)
    assert any(tag.startswith("anndata_version:") for tag in card.data.tags)
    assert ("modality:protein" in card.data.tags) is joint
    assert ("annotated:True" in card.data.tags) is labelled
    headings = re.findall(r"^## (.*)", card.text, re.MULTILINE)
    assert headings == [
        "Use",
        "Description",
        "Metrics",
        "Model parameters",
        "Setup arguments",
        "Data registry",
        "Summary statistics",
        "Training",
        "References",
    ]
    model = av.get.model(fitted, key)
    assert block_below(text, "## Training") == {k: v for k, v in model.info.items() if v is not None}
    network = block_below(text, "## Model parameters")
    assert network.pop("model") == key
    assert network == json.loads(json.dumps(model.config.to_dict()))
    assert block_below(text, "## Setup arguments")["batch_key"] == "batch"
    sizes = dict(rows_below(text, "## Summary statistics"))
    assert sizes["n_cells"] == "300" and sizes["n_genes"] == "60" and sizes["n_latent"] == str(model.config.n_latent)
    assert sizes.get("n_labels") == (str(len(model.classes)) if labelled else None)  # the unlabelled are no class
    assert sizes.get("n_proteins") == ("20" if joint else None)
    places = dict(rows_below(text, "## Data registry"))
    assert places["RNA counts"] == "`mdata['rna'].X`" and places["batch"] == "`mdata.obs['batch']`"
    assert places.get("protein counts") == ("`mdata['prot'].X`" if joint else None)
    assert "**Data is minified**: False" in text
    assert not any(name in text for name in fitted.obs_names)


def test_every_number_of_the_checks(checked):
    text = av.io.model_card(checked)
    found = checked.uns["totalanvi"]["criticism"]
    told = rows_below(text, "### Coefficient of variation of cells")
    cells = found["cv_cell"].astype({"modality": str, "statistic": str}).set_index(["modality", "statistic"])
    names = {"Mean absolute error": "mae", "Pearson correlation": "pearson", "Spearman correlation": "spearman"}
    names |= {"R²": "r2"}
    assert {(row[0], names[row[1]]) for row in told if row[1] in names} == {
        (mod, name) for mod in ("rna", "prot") for name in names.values()
    }
    for modality, statistic, train, validation in told:
        if statistic in names:
            expected = cells.loc[(modality, names[statistic])]
            assert float(train) == pytest.approx(expected["train"], rel=5e-3)  # three digits
            assert float(validation) == pytest.approx(expected["validation"], rel=5e-3)
    genes = rows_below(text, "### Coefficient of variation of features")
    assert float(genes[0][2]) == pytest.approx(found["cv_gene"]["all"][1], rel=5e-3)
    groups = rows_below(text, "### Differential expression")
    assert [(row[0], row[1]) for row in groups] == [
        (str(m), str(g)) for m, g in zip(found["de"]["modality"], found["de"]["group"], strict=True)
    ]
    assert float(groups[0][6]) == pytest.approx(found["de"]["roc_auc"][0], rel=5e-3)
    verdicts = rows_below(text, "### Verdicts")
    assert [row[6] for row in verdicts] == list(found["verdict"]["verdict"].astype(str))
    scores = av.metrics.classification(checked)
    overall = rows_below(text, "### Classification")[0]
    assert float(overall[2]) == pytest.approx(scores.loc["overall", "accuracy"], rel=5e-3)


def test_a_model_alone_has_no_checks(checked):
    text = av.io.model_card(av.get.model(checked))
    assert "Not checked" in text and "### Verdicts" not in text and "### Classification" not in text
    assert "there were no data with the model" in text


def test_numbers_of_scvi_tools_are_told_apart(fitted):
    av.metrics.criticism(fitted, model="scvi", n_samples=2, groupby="batch", definition="scvi", metrics=["cv", "de"])
    text = av.io.model_card(fitted, key="scvi")
    assert "definitions are those of scvi-tools" in text and "t-test" in text and "Wilcoxon" not in text


def test_a_minified_object_says_so(fitted):
    small = av.tl.minify(fitted, model="totalanvi", copy=True)
    text = av.io.model_card(small, key="totalanvi")
    assert "**Data is minified**: True" in text and "obsm['totalanvi_qz_mean']" in text


def test_an_anndata_and_a_layer(fitted):
    adata = fitted["rna"].copy()
    adata.layers["raw"] = adata.X.copy()
    adata.obs["batch"] = fitted.obs["batch"].reindex(adata.obs_names)
    av.tl.scvi(adata, layer="raw", batch_key="batch", max_epochs=1, key_added="mine")
    places = dict(rows_below(av.io.model_card(adata, key="mine"), "## Data registry"))
    assert places == {"RNA counts": "`adata.layers['raw']`", "batch": "`adata.obs['batch']`"}


def test_any_text_is_the_same_in_yaml(fitted):
    odd = ["🫁", 'a: "b" \\ #c', "- x\n---\ny", "Ä\x7f\x85\u2028", "{a: [b]}", "yes", "1"]
    card = ModelCard(av.io.model_card(fitted, key="scvi", license="x: 🫁", tissues=odd))
    assert card.data.license == "x: 🫁"
    assert [tag.removeprefix("tissue:") for tag in card.data.tags if tag.startswith("tissue:")] == odd


def test_what_the_user_says(fitted):
    text = av.io.model_card(
        fitted,
        key="scvi",
        description="Ten donors.",
        references="- Doe 2020",
        training_data_url="https://example.org/data",
    )
    assert "## Description\n\nTen donors.\n" in text and text.endswith("\n\n- Doe 2020\n")
    assert "**Training data**: https://example.org/data" in text and "**Training code**: Not given." in text
    with pytest.raises(ValueError, match="training_code_url='/home/me'"):
        av.io.model_card(fitted, key="scvi", training_code_url="/home/me")
    with pytest.raises(TypeError, match=r"tissues=\['blood'\]"):
        av.io.model_card(fitted, key="scvi", tissues="blood")
    with pytest.raises(ValueError, match="several fitted models"):
        av.io.model_card(fitted)


def test_text_cannot_break_out_of_a_table():
    rows = pd.DataFrame(
        {"group": ["a|b", "<b>c", "d\ne"], "value": [0.12345, float("nan"), 1234567.0], "n": [1, 2, 30]}
    )
    assert markdown_table(rows).splitlines() == [
        "| group | value | n |",
        "| --- | --- | --- |",
        "| a\\|b | 0.123 | 1 |",
        "| &lt;b&gt;c |  | 2 |",
        "| d e | 1.23e+06 | 30 |",
    ]


def test_it_is_the_readme_of_a_folder(checked, tmp_path):
    av.write_model(checked, tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == av.io.model_card(checked)
    card = av.io.model_card(checked, license="mit", description="Mine.")
    av.write_model(checked, tmp_path / "model", card=card, overwrite=True)
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == card
    elsewhere = cite(200, random_state=1)
    av.tl.totalanvi(elsewhere, max_epochs=1)
    other = av.get.model(elsewhere)  # which is not the one in the object, though its key is the same
    av.write_model(checked, tmp_path / "other", model=other)
    assert "Not checked" in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    av.read_model(tmp_path / "model")


def test_tables_of_a_file_give_the_same_card(checked, tmp_path):
    checked.write(tmp_path / "x.h5mu")
    with quiet_mudata():
        back = mudata.read_h5mu(tmp_path / "x.h5mu")
    assert av.io.model_card(back) == av.io.model_card(checked)
