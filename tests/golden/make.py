"""Write the golden files: the numbers of scvi-tools that anvi has to reproduce (see README.md).

scvi-tools is needed here and nowhere else. In a separate environment with torch==2.13.0 and scvi-tools==1.5.0.post1::

    python tests/golden/make.py                          # tests/golden/*.npz
    python tests/golden/make.py --checkpoints DIRECTORY  # five directories of model.save()
"""

import argparse
import inspect
import json
import logging
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import scvi
import torch
from scvi.external import TOTALANVI
from scvi.external.totalanvi._module import TOTALANVAE
from scvi.model import SCANVI, SCVI, TOTALVI
from scvi.module import SCANVAE, TOTALVAE, VAE
from torch.nn.functional import cross_entropy, softplus

N_CELLS, N_GENES, N_PROTEINS, N_BATCH, N_PANEL, N_LABELS, N_LATENT, N_HIDDEN = 18, 20, 6, 3, 2, 3, 4, 8
N_CATS, N_CONTINUOUS, KL_WEIGHT, CLASSIFICATION_RATIO = [2, 3], 2, 0.3, 50.0
MODULES = {"SCVI": VAE, "SCANVI": SCANVAE, "TOTALVI": TOTALVAE, "TOTALANVI": TOTALANVAE}
KEYS = scvi.REGISTRY_KEYS

# name: (class, constructor arguments that are not the defaults, switches of this script)
# The switches: covariates, size_factor, missing ("batch" or "panel": where proteins are unobserved), log_data,
# y_prior, one_batch, train (batch norm on the minibatch, dropout 0), pro_recons_weight.
COV, ENC, NOT_ENC = {"covariates": True}, {"encode_covariates": True}, {"encode_covariates": False}
CONFIGS = {
    "scvi": ("SCVI", {}, {}),
    "scvi_covariates": ("SCVI", NOT_ENC, COV),
    "scvi_covariates_encoded": ("SCVI", {"n_layers": 2, **ENC}, COV),
    "scvi_not_deep": ("SCVI", {"n_layers": 2, "deeply_inject_covariates": False, **ENC}, COV),
    "scvi_gene_batch": ("SCVI", {"dispersion": "gene-batch"}, {}),
    "scvi_gene_label": ("SCVI", {"dispersion": "gene-label"}, {}),
    "scvi_gene_cell": ("SCVI", {"dispersion": "gene-cell"}, {}),
    "scvi_nb": ("SCVI", {"gene_likelihood": "nb"}, {}),
    "scvi_zinb": ("SCVI", {"gene_likelihood": "zinb", "n_layers": 2, "use_layer_norm": "both"}, {}),
    "scvi_poisson": ("SCVI", {"gene_likelihood": "poisson"}, {}),
    "scvi_normal": ("SCVI", {"gene_likelihood": "normal", "log_variational": False}, {"log_data": True}),
    "scvi_latent_library": ("SCVI", {"use_observed_lib_size": False}, {}),
    "scvi_ln": ("SCVI", {"latent_distribution": "ln"}, {}),
    "scvi_size_factor": ("SCVI", {"use_size_factor_key": True}, {"size_factor": True}),
    "scvi_one_batch": ("SCVI", {"n_batch": 1, **ENC}, {"one_batch": True}),
    "scanvi": ("SCANVI", {}, {}),
    "scanvi_covariates": ("SCANVI", NOT_ENC, COV),
    "scanvi_covariates_encoded": ("SCANVI", ENC, COV),
    "scanvi_layer_norm": ("SCANVI", {"n_layers": 3, "use_layer_norm": "both", "use_batch_norm": "none", **ENC}, {}),
    "scanvi_linear": ("SCANVI", {"linear_classifier": True, "gene_likelihood": "nb"}, {}),
    "scanvi_latent_library": ("SCANVI", {"use_observed_lib_size": False}, {}),
    "scanvi_probabilities": ("SCANVI", {"classifier_parameters": {"logits": False}}, {}),
    "scanvi_y_prior": ("SCANVI", {}, {"y_prior": True}),
    "scanvi_train": ("SCANVI", {"gene_likelihood": "nb"}, {"train": True}),
    "totalvi": ("TOTALVI", {}, {}),
    "totalvi_covariates": ("TOTALVI", NOT_ENC, COV),
    "totalvi_covariates_encoded": ("TOTALVI", ENC, COV),
    "totalvi_gene_batch": ("TOTALVI", {"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch"}, {}),
    "totalvi_zinb": ("TOTALVI", {"gene_likelihood": "zinb", "use_size_factor_key": True}, {"size_factor": True}),
    "totalvi_latent_library": ("TOTALVI", {"use_observed_lib_size": False}, {}),
    "totalvi_ln": ("TOTALVI", {"latent_distribution": "ln"}, {}),
    "totalvi_background_exp": ("TOTALVI", {"extra_decoder_kwargs": {"activation_function_bg": "exp"}}, {}),
    "totalvi_missing": ("TOTALVI", {}, {"missing": "batch"}),
    "totalanvi": ("TOTALANVI", {}, {}),
    "totalanvi_covariates": ("TOTALANVI", NOT_ENC, COV),
    "totalanvi_covariates_encoded": ("TOTALANVI", ENC, COV),
    "totalanvi_linear": ("TOTALANVI", {"linear_classifier": True, "use_observed_lib_size": False}, {}),
    "totalanvi_missing": ("TOTALANVI", {}, {"missing": "panel", "pro_recons_weight": 0.7}),
    "totalanvi_train": ("TOTALANVI", {}, {"train": True}),
}
# The gradients would double the size: they are stored for these only.
GRADIENTS = """scvi scvi_covariates_encoded scvi_gene_batch scvi_nb scvi_poisson scvi_normal scvi_latent_library
scanvi scanvi_layer_norm scanvi_train
totalvi totalvi_covariates_encoded totalvi_latent_library
totalanvi totalanvi_missing totalanvi_train""".split()


def make_inputs(switches: dict) -> dict[str, np.ndarray]:
    """The same random cells for every configuration, changed only where the configuration asks for it."""
    rng = np.random.default_rng(0)
    cells = np.arange(N_CELLS)
    rates = rng.gamma(0.7, 4.0, (1, N_GENES)) * rng.lognormal(0, 0.5, (N_CELLS, 1))
    inputs = {
        "x": rng.poisson(rates * rng.gamma(2.0, 0.5, (N_CELLS, N_GENES))).astype(np.float32),
        "y": rng.poisson(rng.gamma(0.8, 40.0, (N_CELLS, N_PROTEINS))).astype(np.float32),
        "batch": rng.permutation(cells % N_BATCH),
        "labels": rng.permutation(cells % (N_LABELS + 1)),
        "panel": rng.permutation(cells % N_PANEL),
        "categorical": np.stack([rng.permutation(cells % n) for n in N_CATS], 1),
        "continuous": rng.normal(size=(N_CELLS, N_CONTINUOUS)).astype(np.float32),
        "size_factor": rng.lognormal(3.0, 0.4, N_CELLS).astype(np.float32),
    }
    inputs["x"][:, 0] += 1  # no empty cell
    inputs["x"] = np.log1p(inputs["x"]) if switches.get("log_data") else inputs["x"]
    inputs["batch"] = inputs["batch"] * (not switches.get("one_batch"))
    if missing := switches.get("missing"):
        inputs["panel_mask"] = np.ones((N_BATCH if missing == "batch" else N_PANEL, N_PROTEINS), dtype=np.int64)
        inputs["panel_mask"][1, [0, 3]] = 0
        inputs["panel_mask"][-1, 4:] = 0
        inputs["mask"] = inputs["panel_mask"][inputs[missing]]
        inputs["y"] *= inputs["mask"].astype(np.float32)
    return inputs


def build(name: str, inputs: dict[str, np.ndarray]):
    """The module with perturbed weights, and its complete constructor arguments as JSON can hold them."""
    cls, changed, switches = CONFIGS[name]
    arguments = {}
    for module_class in [m for m in MODULES.values() if issubclass(MODULES[cls], m)]:  # parent first
        for key, parameter in inspect.signature(module_class).parameters.items():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                arguments[key] = None if parameter.default is parameter.empty else parameter.default
    protein = cls.startswith("TOTAL")
    arguments.update({"n_input_genes": N_GENES, "n_input_proteins": N_PROTEINS} if protein else {"n_input": N_GENES})
    arguments.update(n_batch=N_BATCH, n_hidden=N_HIDDEN, n_latent=N_LATENT, n_labels=N_LABELS)
    arguments["n_labels"] += cls == "SCVI"  # only for gene-label: "unlabelled" is a category like the others
    if protein:
        arguments.update(n_panel=N_BATCH, panel_key=KEYS.BATCH_KEY)
    if switches.get("missing") == "panel":
        arguments.update(n_panel=N_PANEL, panel_key="panel")
    if switches.get("covariates"):
        arguments.update(n_cats_per_cov=N_CATS, n_continuous_cov=N_CONTINUOUS)
    arguments.update(changed)
    arrays = {}
    if not arguments["use_observed_lib_size"]:
        log_library = [np.log(inputs["x"].sum(1))[inputs["batch"] == b] for b in range(N_BATCH)]
        arrays["library_log_means"] = np.array([[v.mean() for v in log_library]])
        arrays["library_log_vars"] = np.array([[v.var() for v in log_library]])
    if "panel_mask" in inputs:
        arrays["protein_batch_mask"] = {str(i): row.astype(bool) for i, row in enumerate(inputs["panel_mask"])}
    if switches.get("y_prior"):
        arrays["y_prior"] = torch.tensor([[0.5, 0.3, 0.2]])

    torch.manual_seed(zlib.crc32(name.encode()))
    module = MODULES[cls](**{**arguments, **arrays})
    for key, value in module.state_dict().items():
        if key.endswith("running_mean"):
            value.copy_(0.3 * torch.randn_like(value))
        elif key.endswith("running_var"):
            value.copy_(0.5 + 1.5 * torch.rand_like(value))
        elif value.is_floating_point() and key not in ("y_prior", "library_log_means", "library_log_vars"):
            value.add_(0.15 * torch.randn_like(value))
        if key in ("l_encoder.mean_encoder.bias", "encoder.l_gene_mean_encoder.bias"):
            value.add_(4.0)
    return module, {k: v for k, v in arguments.items() if k not in arrays}


def make_tensors(cls: str, inputs: dict[str, np.ndarray], switches: dict) -> dict[str, torch.Tensor]:
    """The minibatch in the form in which scvi-tools' loaders hand it to a module."""
    column = lambda name: torch.from_numpy(inputs[name])[:, None]
    tensors = {"X": torch.from_numpy(inputs["x"]), KEYS.BATCH_KEY: column("batch"), KEYS.LABELS_KEY: column("labels")}
    if cls.startswith("TOTAL"):
        tensors |= {KEYS.PROTEIN_EXP_KEY: torch.from_numpy(inputs["y"]), "panel": column("panel").float()}
    if switches.get("covariates"):
        tensors[KEYS.CAT_COVS_KEY] = torch.from_numpy(inputs["categorical"])
        tensors[KEYS.CONT_COVS_KEY] = torch.from_numpy(inputs["continuous"])
    if switches.get("size_factor"):
        tensors[KEYS.SIZE_FACTOR_KEY] = column("size_factor")
    return tensors


class FixedNoise:
    """Replaces Normal.rsample: hands out the given standard normal draws in order, afterwards zeros."""

    def __init__(self, *draws: torch.Tensor):
        self.draws = list(draws)

    def __enter__(self):
        noise = self

        def rsample(self, sample_shape=()):
            eps = noise.draws.pop(0) if noise.draws else torch.zeros_like(self.loc)
            return self.loc + self.scale * eps.view(self.loc.shape)

        self.patch = mock.patch.object(torch.distributions.Normal, "rsample", rsample)
        self.patch.start()

    def __exit__(self, *exception):
        self.patch.stop()
        assert exception[0] or not self.draws


def record(module: torch.nn.Module, names: list[str]) -> dict[str, list]:
    """Collect the outputs of the named submodules, call by call."""
    calls = {name: [] for name in names}
    for name in names:
        module.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: calls[name].append(out))
    return calls


@torch.no_grad()
def deterministic(cls: str, module: torch.nn.Module, tensors: dict) -> dict[str, torch.Tensor]:
    """All that follows from the posterior means (every noise is zero)."""
    with FixedNoise():
        inference = module.inference(**module._get_inference_input(tensors))
        calls = record(module, ["decoder"])
        generative = module.generative(**module._get_generative_input(tensors, inference))
        out = {"qz_mean": inference["qz"].loc, "qz_var": inference["qz"].variance}
        if not module.use_observed_lib_size:
            out |= {"ql_mean": inference["ql"].loc[:, 0], "ql_var": inference["ql"].variance[:, 0]}
        if cls.startswith("TOTAL"):
            px, py = generative["px_"], generative["py_"]
            out |= {f"px_{k}": px[k] for k in ("scale", "rate", "r", "dropout")}
            out |= {f"py_{k}": py[k] for k in ("back_alpha", "back_beta", "fore_scale", "mixing", "r")}
        else:
            out["px_scale"], _, out["px_rate"], out["px_dropout"] = calls["decoder"][0]
            px = generative["px"]
            if module.gene_likelihood != "poisson":
                theta = px.scale if module.gene_likelihood == "normal" else px.theta
                out["px_r"] = theta[0] if module.dispersion == "gene" else theta
        if cls.endswith("ANVI"):
            given = {"x": tensors["X"], "batch_index": tensors[KEYS.BATCH_KEY]}
            given |= {"y": tensors[KEYS.PROTEIN_EXP_KEY]} if cls == "TOTALANVI" else {}
            given |= {"cont_covs": tensors.get(KEYS.CONT_COVS_KEY), "cat_covs": tensors.get(KEYS.CAT_COVS_KEY)}
            out["logits"] = module.classify(**given)
    return out


def gaussian_kl(mean, sd, prior_mean, prior_sd):
    return torch.log(prior_sd / sd) + (sd**2 + (mean - prior_mean) ** 2) / (2 * prior_sd**2) - 0.5


@torch.no_grad()
def decompose(cls, module, tensors, inference, generative, losses, calls) -> dict[str, torch.Tensor]:
    """The loss, term by term: one value per cell, and one number for the classification."""
    term, qz, z = {}, inference["qz"], inference["z"]
    zero, one = torch.zeros(()), torch.ones(())
    if cls.startswith("TOTAL"):
        term["reconstruction_rna"] = losses.reconstruction_loss["reconst_loss_gene"]
        term["reconstruction_protein"] = losses.reconstruction_loss["reconst_loss_protein"]
        py, prior = generative["py_"], inference["back_mean_prior"]
        eta = generative["per_batch_efficiency"].log()
        kl_back = gaussian_kl(py["back_alpha"], py["back_beta"], prior.loc, prior.scale)
        if module.protein_batch_mask is not None:
            panels = tensors[module.panel_key][:, 0].long().tolist()
            kl_back = kl_back * torch.tensor(np.stack([module.protein_batch_mask[str(p)] for p in panels]))
        term["kl_background"] = kl_back.sum(1)
        term["efficiency"] = (eta + eta**2 / 2 + 0.5 * np.log(2 * np.pi)).sum(1)
        term["background_nudge"] = 1e-3 * softplus(-py["mixing"]).sum(1)
        together = term["kl_background"] + term["efficiency"] + term["background_nudge"]
        torch.testing.assert_close(together, losses.kl_local["kl_div_back_pro"], rtol=1e-5, atol=1e-4)
    else:
        term["reconstruction_rna"] = -generative["px"].log_prob(tensors["X"]).sum(-1)
    if not module.use_observed_lib_size:
        batch = tensors[KEYS.BATCH_KEY][:, 0]
        prior = module.library_log_means[0, batch], module.library_log_vars[0, batch].sqrt()
        term["kl_library"] = gaussian_kl(inference["ql"].loc[:, 0], inference["ql"].scale[:, 0], *prior)
    if not cls.endswith("ANVI"):
        return term | {"kl_z": gaussian_kl(qz.loc, qz.scale, zero, one).sum(1)}
    probs = calls["classifier"][0]
    probs = probs.softmax(-1) if module.classifier.logits else probs
    qu, u = calls["encoder_z2_z1"][0]
    mean, variance = calls["decoder_z1_z2"][0]
    by_label = lambda rows: rows.view(N_LABELS, N_CELLS, -1).sum(-1)
    distance = (z.repeat(N_LABELS, 1) - mean) ** 2 / variance
    term["log_q_z"] = qz.log_prob(z).sum(-1)
    term["log_p_z_labels"] = by_label(-0.5 * (torch.log(2 * np.pi * variance) + distance))
    term["kl_u_labels"] = by_label(gaussian_kl(qu.loc, qu.scale, zero, one))
    term["log_p_z"] = (probs * term["log_p_z_labels"].T).sum(1)
    term["kl_u"] = (probs * term["kl_u_labels"].T).sum(1)
    term["kl_c"] = (probs * (probs.log() - module.y_prior.log())).sum(1)
    term["classification"] = cross_entropy(losses.logits, losses.true_labels[:, 0])
    return term | {"q_c": probs, "u": u.view(N_LABELS, N_CELLS, -1)}


def coefficients(cls: str, w: float, pro_recons_weight: float) -> dict[str, float]:
    """The factor of each term's mean over the cells in the loss of scvi-tools."""
    factors = {"reconstruction_rna": 1.0, "kl_library": w if cls == "SCANVI" else 1.0}
    if cls.startswith("TOTAL"):
        factors["reconstruction_protein"] = w * pro_recons_weight
        factors |= {"kl_background": w, "efficiency": w, "background_nudge": w}
    if cls.endswith("ANVI"):
        return factors | {"log_q_z": 1.0, "log_p_z": -1.0, "kl_u": w, "kl_c": w, "classification": CLASSIFICATION_RATIO}
    return factors | {"kl_z": w}


def golden(name: str) -> dict[str, np.ndarray]:
    """Everything that is stored for one configuration."""
    cls, _, switches = CONFIGS[name]
    inputs = make_inputs(switches)
    module, arguments = build(name, inputs)
    tensors = make_tensors(cls, inputs, switches)
    protein, supervised = cls.startswith("TOTAL"), cls.endswith("ANVI")
    arrays = {f"weight/{k}": v.clone() for k, v in module.state_dict().items() if v.is_floating_point()}
    module.eval()
    arrays |= {f"out/{k}": v for k, v in deterministic(cls, module, tensors).items()}

    n, d = N_CELLS, N_LATENT
    shapes = {"z": (n, d), "library": (n,), "back": (n, N_PROTEINS), "u": (N_LABELS, n, d)}  # in the order of the draws
    generator = torch.Generator().manual_seed(1)
    noise = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    used = {"z": True, "library": not module.use_observed_lib_size, "back": protein, "u": supervised}
    drawn = [v for k, v in noise.items() if used[k] or (k == "library" and protein)]
    loss_kwargs = {"kl_weight": KL_WEIGHT}
    pro_recons_weight = switches.get("pro_recons_weight", 1.0)
    if protein:
        loss_kwargs["pro_recons_weight"] = pro_recons_weight
    if supervised:
        labelled = torch.from_numpy(inputs["labels"] < N_LABELS)
        loss_kwargs["labelled_tensors"] = {k: v[labelled] for k, v in tensors.items()}
        loss_kwargs["classification_ratio"] = CLASSIFICATION_RATIO
    if switches.get("train"):
        module.train()
        for layer in filter(lambda m: isinstance(m, torch.nn.Dropout), module.modules()):
            layer.p = 0.0
    calls = record(module, ["classifier", "encoder_z2_z1", "decoder_z1_z2"] if supervised else [])
    with FixedNoise(*drawn):
        inference, generative, losses = module(tensors, loss_kwargs=loss_kwargs)
    losses.loss.backward()
    term = decompose(cls, module, tensors, inference, generative, losses, calls)
    factors = {k: v for k, v in coefficients(cls, KL_WEIGHT, pro_recons_weight).items() if k in term}
    total = sum(factor * term[k].double().mean() for k, factor in factors.items())
    error = abs(total - losses.loss.item()) / abs(losses.loss.item())
    assert error < 1e-6, (name, error)

    arrays |= {f"noise/{k}": v for k, v in noise.items() if used[k]}
    arrays |= {f"sample/{k}": term.pop(k) for k in ("u", "q_c") if k in term}
    arrays |= {f"term/{k}": v for k, v in term.items()} | {"loss": losses.loss}
    if name in GRADIENTS:
        arrays |= {f"grad/{k}": p.grad for k, p in module.named_parameters() if p.grad is not None}
    if switches.get("train"):
        arrays |= {f"after/{k}": v for k, v in module.state_dict().items() if "running_" in k}
    wanted = ["x", "batch", "labels", "mask", "panel_mask", *(["y", arguments["panel_key"]] if protein else [])]
    wanted += ["size_factor"] if "size_factor" in switches else []
    wanted += ["categorical", "continuous"] if "covariates" in switches else []
    arrays |= {f"input/{k}": torch.from_numpy(v) for k, v in inputs.items() if k in wanted}
    config = {"name": name, "class": cls, "arguments": arguments, "train": bool(switches.get("train"))}
    config.update(n_genes=N_GENES, n_proteins=N_PROTEINS * protein, n_labels=N_LABELS * supervised)
    config.update(n_batch=arguments["n_batch"], n_panel=arguments.get("n_panel"))
    config.update(n_cats=arguments["n_cats_per_cov"] or [], n_continuous=arguments["n_continuous_cov"])
    config |= {k: loss_kwargs.get(k) for k in ("kl_weight", "pro_recons_weight", "classification_ratio")}
    config |= {"adversarial": False, "coefficients": factors, "versions": [scvi.__version__, torch.__version__]}
    result = {key: value.detach().numpy() for key, value in arrays.items()}
    assert all(v.dtype in (np.float32, np.int64) and np.isfinite(v).all() for v in result.values()), name
    return result | {"config": np.array(json.dumps(config))}


def checkpoints(folder: Path) -> None:
    """Train five small models for one epoch and keep model.save() and expected.npz (inputs, latent, predictions)."""
    from anndata import AnnData
    from mudata import MuData

    inputs, rng = make_inputs({}), np.random.default_rng(1)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(N_CELLS)])
    obs["batch"] = [f"batch{b}" for b in inputs["batch"]]
    obs["cell_type"] = [["B cell", "T cell", "NK cell", "Missing"][c] for c in inputs["labels"]]
    obs["sex"] = [["female", "male"][c] for c in inputs["categorical"][:, 0]]
    obs["donor"] = [f"donor{c}" for c in inputs["categorical"][:, 1]]
    obs["age"], obs["depth"] = inputs["continuous"].T.astype(np.float64)
    genes, proteins = [f"gene{i}" for i in range(N_GENES)], [f"protein{i}" for i in range(N_PROTEINS)]
    y = np.where((inputs["batch"] == 2)[:, None] & (np.arange(N_PROTEINS) >= 4), 0, inputs["y"]).astype(np.float32)
    in_rna = {"rna_layer": "rna", "protein_layer": "protein", "batch_key": "rna"}
    labels = {"labels_key": "cell_type", "unlabeled_category": "Missing"}  # in the middle of the alphabet
    covariates = {"categorical_covariate_keys": ["sex", "donor"], "continuous_covariate_keys": ["age", "depth"]}
    plans = {
        "scvi": (SCVI, {"batch_key": "batch"}, {}),
        "scanvi": (SCANVI, {"batch_key": "batch", **labels, **covariates}, {"n_layers": 2, "encode_covariates": True}),
        "totalvi_anndata": (TOTALVI, {"batch_key": "batch", "protein_expression_obsm_key": "adt", **covariates}, {}),
        "totalvi": (TOTALVI, {"batch_key": "batch", "modalities": in_rna}, {}),
        "totalanvi": (TOTALANVI, {"batch_key": "batch", "modalities": {"labels_key": "rna", **in_rna}, **labels}, {}),
    }
    for name, (cls, setup, arguments) in plans.items():
        scvi.settings.seed = int(rng.integers(1000))
        data = AnnData(inputs["x"], obs=obs.copy(), var=pd.DataFrame(index=genes))
        if "modalities" in setup:
            data = MuData({"rna": data, "protein": AnnData(y, obs=obs[[]].copy(), var=pd.DataFrame(index=proteins))})
            cls.setup_mudata(data, rna_layer=None, protein_layer=None, **setup)
        else:
            data.obsm["adt"] = pd.DataFrame(y, index=obs.index, columns=proteins)
            cls.setup_anndata(data, **setup)
        model = cls(data, n_hidden=N_HIDDEN, n_latent=N_LATENT, **arguments)
        model.train(max_epochs=1, train_size=0.9, enable_progress_bar=False, accelerator="cpu")
        model.save(folder / name, overwrite=True)
        expected = {"latent_mean": model.get_latent_representation(give_mean=True).astype(np.float32)}
        if "labels_key" in setup:
            soft = model.predict(soft=True)
            expected |= {"probabilities": soft.to_numpy(np.float32), "class_names": np.array(list(soft.columns), str)}
        expected |= {k: inputs[k] for k in ("x", "batch", "labels", "categorical", "continuous")} | {"y": y}
        np.savez_compressed(folder / name / "expected.npz", **expected)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="write saved models to this folder instead")
    parser.add_argument("names", nargs="*", default=list(CONFIGS), help="configurations (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.checkpoints:
        checkpoints(options.checkpoints)
    for config_name in () if options.checkpoints else options.names:
        np.savez_compressed(Path(__file__).parent / f"{config_name}.npz", **golden(config_name))
