"""Models of scvi-tools, opened: to the digit, by version, and what does not go with them."""

import warnings

import numpy as np
import pytest
import torch
from anndata import AnnData
from checkpoints import CHECKPOINTS, NAMES, content_of, data_of, expected, registry, saved
from mudata import MuData

import anvi as av
from anvi.io import from_scvi_tools

# --- to the digit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_latent_space_and_predictions_are_those_of_scvi_tools(name):
    data, there = data_of(name), expected(name)
    model = from_scvi_tools(CHECKPOINTS / name, data)
    latent = av.tl.latent(data, model=model, inplace=False)
    # float32 on both sides, in another order of sums
    np.testing.assert_allclose(latent, there["latent_mean"], rtol=0, atol=1e-5)
    if "probabilities" in there:
        table = av.tl.predict(data, model=model, inplace=False)
        assert list(table.columns) == list(there["class_names"])
        np.testing.assert_allclose(table.to_numpy(), there["probabilities"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_opened_model_is_one_of_ours(name):
    model = from_scvi_tools(CHECKPOINTS / name)
    assert model.name == name.removesuffix("_anndata")
    assert not model.network.training
    assert model.config.objective == "scvi-tools"
    assert model.info["source"] == "scvi-tools 1.5.0.post1"
    again = av.Model.from_slot(model.to_slot(), model.history)
    assert again.setup == model.setup
    assert again.config == model.config
    weights = model.network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in again.network.state_dict().items())


def test_a_fit_can_go_on_from_it():
    data = data_of("scanvi")
    data.obs["cell_type"] = ["B cell", "T cell", "NK cell"] * 6
    model = from_scvi_tools(CHECKPOINTS / "scvi", data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        av.tl.scanvi(data, "cell_type", init=model, batch_key="batch", max_epochs=1, train_size=1, early_stopping=False)
    assert data.obsm["X_scanvi"].shape == (18, 4)


# --- by the letter of the registry -----------------------------------------------------------------------------------


# --- by version ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, parameters, softmax",
    [
        ("0.20.3", None, True),
        ("1.0.4", {"logits": True}, False),
        ("1.1.0", None, False),
        ("2.0.0", None, False),
        ("1.5.0", {"logits": False}, True),
    ],
)
def test_classifiers_of_before_1_1_are_trained_on_probabilities(tmp_path, version, parameters, softmax):
    content, there = content_of("scanvi"), expected("scanvi")
    registry(content)["scvi_version"] = version
    content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"]["classifier_parameters"] = parameters
    data = data_of("scanvi")
    model = from_scvi_tools(saved(content, tmp_path), data)
    assert model.config.classifier_softmax is softmax
    # the softmax is what predictions are made of in either case
    table = av.tl.predict(data, model=model, inplace=False)
    np.testing.assert_allclose(table.to_numpy(), there["probabilities"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, version, activation, scale",
    [
        ("totalvi", "1.1.6", None, "exp"),
        ("totalvi", "1.1.6", "softplus", "softplus"),
        ("totalvi", "1.2.0", None, "softplus"),
        ("totalvi", "1.5.0", "exp", "exp"),
        ("totalanvi", "1.1.6", None, "softplus"),
    ],
)
def test_backgrounds_of_before_1_2_are_exponential(tmp_path, name, version, activation, scale):
    content = content_of(name)
    registry(content)["scvi_version"] = version
    if activation is not None:
        options = {"extra_decoder_kwargs": {"activation_function_bg": activation}}
        content["attr_dict"]["init_params_"]["kwargs"]["model_kwargs"] |= options
    assert from_scvi_tools(saved(content, tmp_path)).config.background_scale == scale


def test_files_of_before_0_15_are_not_opened(tmp_path):
    for name in ("attr.pkl", "model_params.pt", "var_names.csv"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"before 0\.15.*convert_legacy_save"):
        from_scvi_tools(tmp_path)
    content = content_of("scvi")
    content["attr_dict"] = {"scvi_setup_dict_": {}}
    with pytest.raises(ValueError, match="before 0.15"):
        from_scvi_tools(saved(content, tmp_path))


# --- what is not opened says why -------------------------------------------------------------------------------------


def test_paths_and_prefixes(tmp_path):
    content = content_of("scvi")
    saved(content, tmp_path).rename(tmp_path / "mine_model.pt")
    assert from_scvi_tools(str(tmp_path), prefix="mine_").name == "scvi"
    assert from_scvi_tools(tmp_path / "mine_model.pt").name == "scvi"
    with pytest.raises(FileNotFoundError, match="no model.pt in .*mine_model.pt"):
        from_scvi_tools(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no"):
        from_scvi_tools(tmp_path / "nowhere")


@pytest.mark.parametrize("class_name", ["PEAKVI", "scvi", None, 3])
def test_another_class_is_refused_by_name(tmp_path, class_name):
    content = content_of("scvi")
    registry(content)["model_name"] = class_name
    with pytest.raises(ValueError, match=f"class {class_name!r}; anvi opens SCVI, SCANVI, TOTALVI, TOTALANVI"):
        from_scvi_tools(saved(content, tmp_path))


@pytest.mark.parametrize("key", ["model_state_dict", "attr_dict"])
def test_a_file_that_is_no_model_says_what_it_lacks(tmp_path, key):
    content = content_of("scvi")
    del content[key]
    with pytest.raises(ValueError, match=f"no model of scvi-tools: it has no '{key}'"):
        from_scvi_tools(saved(content, tmp_path))
    with pytest.raises(ValueError, match="no model of scvi-tools: it has no 'model_state_dict'"):
        from_scvi_tools(saved([1, 2], tmp_path))


def test_data_that_do_not_go_with_the_model_are_refused_at_once():
    mdata = data_of("totalvi")
    path = CHECKPOINTS / "totalvi"
    with pytest.raises(ValueError, match=r"modalities 'rna', 'protein'; this MuData has 'rna', 'adt'\. Rename"):
        from_scvi_tools(path, renamed(mdata, protein="adt"))
    other = mdata["protein"].copy()
    other.var_names = [f"CD{i}" for i in range(6)]
    with pytest.raises(ValueError, match=r"None of the model's 6 proteins \(protein0, .*CD0, CD1, CD2"):
        from_scvi_tools(path, renamed(mdata, protein="protein", to=other))
    with pytest.raises(ValueError, match="lacks 1 of the model's 20 genes"):
        from_scvi_tools(CHECKPOINTS / "scvi", data_of("scvi")[:, 1:].copy())
    strange = data_of("scvi")
    strange.obs["batch"] = "elsewhere"
    with pytest.raises(ValueError, match="holds 'elsewhere', which the model has not seen"):
        from_scvi_tools(CHECKPOINTS / "scvi", strange)
    with pytest.raises(TypeError, match="Expected a MuData or an AnnData, got dict"):
        from_scvi_tools(CHECKPOINTS / "scvi", {})


def renamed(mdata: MuData, protein: str, to: AnnData | None = None) -> MuData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MuData({"rna": mdata["rna"], protein: mdata["protein"] if to is None else to})


def test_a_folder_of_ours_is_called_so(tmp_path):
    av.write_model(from_scvi_tools(CHECKPOINTS / "scvi"), tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="a model folder of anvi is opened by av.read_model"):
        from_scvi_tools(tmp_path / "ours")
