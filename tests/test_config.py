"""The configuration: what can be combined, what is refused and how it says so."""

import inspect
import json

import pytest
import torch
from networks import MODELS, make_config

from anvi.nn import PRESETS, VAE, Config

SEMI, JOINT = {"n_labels": 3}, {"n_proteins": 4}

REFUSED = {
    "latent_distribution='ln' with labels": SEMI | {"latent_distribution": "ln"},
    "gene_likelihood='normal' outside scvi": SEMI | {"gene_likelihood": "normal"},
    "gene_likelihood='normal' outside scvi. ": JOINT | {"gene_likelihood": "normal"},
    "gene_likelihood='normal' with dispersion='gene-cell'": {"gene_likelihood": "normal", "dispersion": "gene-cell"},
    "dispersion='gene-label' without labels": {"dispersion": "gene-label"},
    "dispersion='gene-label' without labels ": JOINT | {"dispersion": "gene-label"},
    "dispersion='gene-label' with labels and objective='scvi-tools'": SEMI
    | {"dispersion": "gene-label", "objective": "scvi-tools"},
    "deeply_inject_covariates=False with proteins": JOINT | {"deeply_inject_covariates": False},
    "log_variational=False with proteins": JOINT | {"log_variational": False},
}


@pytest.mark.parametrize("message, options", REFUSED.items(), ids=list(REFUSED))
def test_a_combination_that_is_not_built_is_refused_and_says_what_to_do(message, options):
    with pytest.raises(ValueError) as error:
        Config(n_genes=5, **options).checked()
    assert str(error.value).startswith("This combination is not built: " + message.strip())
    assert "Use " in str(error.value) or "Leave " in str(error.value)


def test_every_refusal_is_tested():
    told = {why for options in REFUSED.values() for why in Config(n_genes=5, **options)._refusals()}
    assert len(told) == inspect.getsource(Config._refusals).count("yield ")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gene_likelihood": "normal"},
        {"dispersion": "gene-label", "n_dispersion_labels": 3, "objective": "scvi-tools"},
        {"deeply_inject_covariates": False, "log_variational": False},
        SEMI | {"dispersion": "gene-label"},
        SEMI | {"objective": "scvi-tools"},
        JOINT | {"latent_distribution": "ln"},
        JOINT | SEMI | {"dispersion": "gene-cell", "library": "latent"},
    ],
    ids=str,
)
def test_what_is_built_is_not_refused(options):
    VAE(Config(n_genes=5, **options))


@pytest.mark.parametrize(
    "name",
    [
        "gene_likelihood",
        "dispersion",
        "protein_dispersion",
        "library",
        "latent_distribution",
        "label_prior",
        "use_batch_norm",
        "use_layer_norm",
        "objective",
        "background_scale",
    ],
)
def test_a_misspelled_choice_lists_the_right_ones(name):
    with pytest.raises(ValueError, match=f"{name}='wrong' is not one of '"):
        Config(n_genes=5, **{name: "wrong"}).checked()


@pytest.mark.parametrize("name", ["n_hidden", "n_latent", "n_layers_encoder", "n_layers_decoder"])
def test_a_width_is_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Config(n_genes=5, **{name: 0}).checked()


@pytest.mark.parametrize("name", ["dropout_encoder", "dropout_decoder", "dropout_u"])
@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_dropout_rate_is_a_share(name, rate):
    with pytest.raises(ValueError, match=f"{name}={rate} must be at least 0 and below 1"):
        Config(n_genes=5, **{name: rate}).checked()


def test_the_papers_spelling_is_understood():
    assert Config(n_genes=5, gene_likelihood="negative_binomial").checked().gene_likelihood == "nb"


def test_a_network_is_never_made_of_an_unchecked_configuration():
    with pytest.raises(ValueError, match="not built"):
        VAE(Config(n_genes=5, dispersion="gene-label"))


def test_a_covariate_with_one_category_injects_nothing():
    config = Config(n_genes=5, n_batches=1, n_categories=(2, 1, 3))
    assert config.covariate_sizes == (2, 3)
    assert config.n_covariate_rows == 5
    assert Config(n_genes=5, n_batches=4).covariate_sizes == (4,)


@pytest.mark.parametrize("value, sides", {"none": "", "encoder": "e", "decoder": "d", "both": "ed"}.items())
@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_sides_of_a_norm(value, sides, kind):
    config = Config(n_genes=5, **{"use_batch_norm": "none", "use_layer_norm": "none"} | {f"use_{kind}_norm": value})
    other = {"batch": "layer", "layer": "batch"}[kind]
    for side in ("encoder", "decoder"):
        assert config.norm_of(side, kind) is (side[0] in sides)
        assert config.norm_of(side, other) is False


def test_only_the_incumbents_objective_has_a_constant_inside_logarithms():
    assert (Config(n_genes=5).eps, Config(n_genes=5).prior_floor) == (0.0, 1e-4)
    literal = Config(n_genes=5, objective="scvi-tools")
    assert (literal.eps, literal.prior_floor) == (1e-8, 0.0)


@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_survives_json(model):
    config = make_config(model)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert isinstance(again.n_categories, tuple)


def test_a_stored_configuration_with_unknown_or_missing_entries_says_which():
    values = make_config("scvi").to_dict()
    with pytest.raises(ValueError, match=r"unknown entries \['wings'\].*newer anvi"):
        Config.from_dict(values | {"wings": 2})
    del values["n_genes"]
    with pytest.raises(ValueError, match="lacks 'n_genes'"):
        Config.from_dict(values)
    with pytest.raises(ValueError, match="not built"):
        Config.from_dict(make_config("scvi").to_dict() | {"dispersion": "gene-label"})


@pytest.mark.parametrize("model", MODELS)
def test_the_presets_are_the_published_architectures(model):
    config = Config(n_genes=5, **MODELS[model] | PRESETS[model]).checked()
    joint = "total" in model
    assert (config.n_hidden, config.n_latent) == ((256, 20) if joint else (128, 10))
    assert (config.n_layers_encoder, config.n_layers_decoder) == ((2, 1) if joint else (1, 1))
    assert (config.dropout_encoder, config.dropout_decoder) == ((0.2, 0.2) if joint else (0.1, 0.0))
    assert config.dropout_u == (0.05 if joint else 0.1)
    assert config.gene_likelihood == ("nb" if joint else "zinb")
    assert (config.has_protein, config.has_labels) == (joint, "anvi" in model)
    assert sum(p.numel() for p in VAE(config, torch.Generator()).parameters()) > 0
