"""The contract of design.md: who may import whom, what public functions look like, what no file may hold."""

import ast
import doctest
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest

import anvi as av
from anvi.nn import Config

SOURCE = Path(av.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(file.relative_to(SOURCE)) for file in FILES]
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=NAMES)

FITS = ("scvi", "scanvi", "totalvi", "totalanvi")
NAMESPACES = ("tl", "pp", "metrics", "get", "pl")


def public(namespace: str) -> list:
    """The public functions of a namespace."""
    module = getattr(av, namespace)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = [(name, getattr(module, name)) for name in names]
    return [
        pytest.param(function, id=f"{namespace}.{name}")
        for name, function in found
        if inspect.isfunction(function) and function.__module__.startswith("anvi.")
    ]


FUNCTIONS = [function for namespace in NAMESPACES for function in public(namespace)]
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS)


def imports(file: Path, *, inside: bool) -> set[str]:
    """Modules that a file imports, relative ones resolved; with `inside`, also in functions."""
    tree = ast.parse(file.read_text())
    package = ["anvi", *file.relative_to(SOURCE).parent.parts]
    found = set()
    for node in ast.walk(tree) if inside else at_module_level(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names if module.startswith("anvi")}
    return found


def at_module_level(tree: ast.AST):
    """Nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_module_level(node)


def top(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def room(module: str) -> str:
    """The part of the package that a module belongs to: `_data`, `nn`, `_model`, ..."""
    return module.split(".")[1] if module.count(".") else ""


# imports ----------------------------------------------------------------------------------------------------------

STDLIB = set(sys.stdlib_module_names) | {"__future__"}


@pytest.mark.parametrize("file", sorted((SOURCE / "nn").glob("*.py")), ids=lambda file: file.name)
def test_the_network_imports_torch_only(file):
    found = imports(file, inside=True)
    optional = {"triton"} if file.stem.startswith("kernels") else set()  # imported only where Triton is there
    assert top(found) - STDLIB <= {"torch", "anvi"} | optional
    assert {room(module) for module in found if module.startswith("anvi")} <= {"nn"}


@pytest.mark.parametrize("file", sorted((SOURCE / "pl").glob("*.py")), ids=lambda file: file.name)
def test_plots_read_slots_only(file):
    found = imports(file, inside=True)
    assert "torch" not in top(found)
    assert {room(module) for module in found if module.startswith("anvi")} <= {
        "pl",
        "settings",
        "_files",
        "_backed",
        "_data",
    }
    data = {module for module in found if module.startswith("anvi._data")}
    assert {module.split(".")[2] for module in data if module.count(".") > 1} <= {
        "slots",
        "antibodies",  # which gene a protein is of
        "containers",
        "counts",  # what is drawn of a matrix is checked as it is for a model
        "setup",
        "rankings",
        "predictions",
        "fits",
    }


@EVERY_FILE
def test_heavy_packages_are_imported_where_they_are_used(file):
    assert not top(imports(file, inside=False)) & {
        "scanpy",
        "muon",
        "captum",
        "matplotlib",
        "seaborn",
        "sklearn",
        "IPython",
    }


# what each part may use; what is not here, nobody but the front doors may use
ALLOWED = {
    "nn": {"nn"},
    "settings": {"settings"},
    "_arguments": {"_arguments"},
    "_runtime": {"_runtime", "settings"},
    "datasets": {"datasets", "_arguments", "_backed", "settings"},
    "_files": {"_files"},
    "_backed": {"_backed", "_arguments", "_files", "_runtime"},
    "_stream": {"_stream", "_runtime", "nn"},
    "_data": {"_data", "_backed", "_stream", "nn", "settings"},
    "_fit": {"_fit", "_files", "_data", "nn", "_runtime", "settings"},
    "_model": {"_model", "_files", "_data", "nn"},
    "_store": {"_store", "_arguments", "_runtime", "_files", "_model", "_data", "settings"},
    "_find": {"_find", "_backed", "_files", "_store", "_model", "_data"},
    "_posterior": {"_posterior", "_model", "_data", "nn"},
    "pp": {"pp", "_runtime", "_backed", "_find", "_model", "_data"},
    "tl": {
        "tl",
        "_arguments",
        "_backed",
        "_files",
        "_runtime",
        "_posterior",
        "_find",
        "_model",
        "_fit",
        "_data",
        "nn",
        "settings",
    },
    "metrics": {
        "metrics",
        "_arguments",
        "_runtime",
        "_backed",
        "tl",
        "_posterior",
        "_fit",
        "_find",
        "_model",
        "_data",
        "nn",
        "settings",
    },
    "get": {"get", "_runtime", "_backed", "tl", "_posterior", "_find", "_model", "_data"},
    "pl": {"pl", "_files", "_backed", "_data", "settings"},
    "io": {
        "io",
        "_arguments",
        "_runtime",
        "_backed",
        "_files",
        "metrics",
        "_find",
        "_store",
        "_model",
        "_data",
        "nn",
        "settings",
    },
}
FRONT_DOORS = ("__init__", "__main__")


@EVERY_FILE
def test_arrows_go_one_way(file):
    parts = file.relative_to(SOURCE).with_suffix("").parts
    if parts[0] in FRONT_DOORS:
        return
    used = {room(module) for module in imports(file, inside=True) if module.startswith("anvi.")}
    assert used <= ALLOWED[parts[0]]


def test_the_layers_have_no_cycle():
    order = [
        "nn",
        "settings",
        "_arguments",
        "_runtime",
        "_files",
        "_backed",
        "_stream",
        "datasets",
        "_data",
        "_model",
        "_store",
        "_find",
        "_fit",
        "_posterior",
        "pp",
        "tl",
        "metrics",
        "get",
        "pl",
        "io",
    ]
    assert set(order) == set(ALLOWED)
    for part, used in ALLOWED.items():
        assert all(order.index(other) <= order.index(part) for other in used), part


def test_import_is_light():
    code = (
        "import sys, json, anvi; anvi.tl.totalanvi, anvi.pp.check, anvi.get.model, anvi.io\n"
        "print(json.dumps([name for name in "
        "('scanpy', 'muon', 'captum', 'matplotlib', 'sklearn', 'seaborn', 'numba', 'scipy.stats') "
        "if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:anvi", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert done.stderr == ""


# signatures -------------------------------------------------------------------------------------------------------


def test_there_are_functions_to_look_at():
    assert len(FUNCTIONS) >= 6 + 2 + 3


@EVERY_FUNCTION
def test_signature(function):
    parameters = list(inspect.signature(function).parameters.values())
    first = "query" if "query" in function.__name__ else "data"  # as sc.tl.ingest has it
    assert parameters[0].name == first and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    assert len(positional) <= 3
    assert not any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_name = {p.name: p for p in parameters}
    for name, default in (("copy", False), ("inplace", True)):
        if name in by_name:
            assert by_name[name].kind is inspect.Parameter.KEYWORD_ONLY and by_name[name].default is default
    assert not {"adata", "mdata", "seed", "verbose", "silent", "n_jobs"} & set(by_name)
    if "random_state" in by_name:
        assert by_name["random_state"].default == 0 and by_name["random_state"].kind is inspect.Parameter.KEYWORD_ONLY
    if "device" in by_name:
        assert by_name["device"].default == "auto"
    hints = inspect.get_annotations(function)
    untyped = [p.name for p in parameters if p.name not in hints and p.kind is not p.VAR_KEYWORD]
    assert not untyped


@pytest.mark.parametrize("name", FITS)
def test_fits(name):
    parameters = inspect.signature(getattr(av.tl, name)).parameters
    assert "copy" in parameters and "inplace" not in parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == (["data", "labels_key"] if name.endswith("anvi") else ["data"])
    common = (
        "batch_key layer categorical_covariate_keys continuous_covariate_keys size_factor_key n_latent gene_likelihood "
        "dispersion max_epochs batch_size lr train_size early_stopping device random_state key_added copy"
    ).split()
    assert set(common) <= set(parameters)
    assert parameters["batch_key"].default is None and parameters["key_added"].default is None
    if name.endswith("anvi"):
        assert parameters["labels_key"].default == "cell_type"
        assert parameters["unlabeled_category"].default == "Unknown"
        assert {"init", "classification_ratio", "label_prior", "linear_classifier"} <= set(parameters)
    if "total" in name:
        assert parameters["missing"].default == "auto" and {"panel_key", "rna_mod", "prot_mod", "prot_obsm"} <= set(
            parameters
        )
    assert parameters["rna_mod"].default == "rna"


def test_the_four_fits_agree_where_they_share():
    seen = {}
    for name in FITS:
        for parameter in inspect.signature(getattr(av.tl, name)).parameters.values():
            told = seen.setdefault(parameter.name, parameter)
            assert (told.default, told.annotation, told.kind) == (
                parameter.default,
                parameter.annotation,
                parameter.kind,
            )


@pytest.mark.parametrize("name", ["latent", "predict"])
def test_questions(name):
    parameters = inspect.signature(getattr(av.tl, name)).parameters
    assert {"model", "key_added", "inplace"} <= set(parameters) and "copy" not in parameters
    assert parameters["model"].default is None


def test_options_that_are_not_in_the_signature_are_those_of_network_and_training():
    from anvi._fit.plan import Plan
    from anvi._fit.start import NO_OPTIONS
    from anvi.tl._fit import Options

    named = set(inspect.signature(av.tl.totalanvi).parameters) | set(NO_OPTIONS)
    there = {*Config.__dataclass_fields__, *Plan.__dataclass_fields__}
    listed = set(Options.__annotations__)
    assert listed <= there
    assert there - named - listed == set()


# docstrings -------------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """The sections of a numpydoc docstring."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("function", FUNCTIONS + public("io") + public("datasets"))
def test_docstring(function):
    found = sections(function.__doc__)
    assert {"Parameters", "Returns", "Examples"} <= set(found)
    assert inspect.cleandoc(function.__doc__).splitlines()[0].endswith(".")
    assert not re.search(r"\{(data|rna_data|labels|panels|rna_mod|mods|fit|raises)\}", function.__doc__)
    described = set()
    for line in found["Parameters"].splitlines():
        if line and not line.startswith(" "):
            assert ":" not in line, f"types belong in the signature: {line}"
            described |= {name.strip().lstrip("*") for name in line.split(",")}
    assert described == set(inspect.signature(function).parameters)
    assert ">>> " in found["Examples"]
    prose = re.sub(r"`[^`]*`", "", function.__doc__.partition(">>> ")[0])
    assert not re.search(r"\w_(?=[\s).,;'\"]|$)", prose), "Sphinx takes a word that ends in _ for a reference"


@pytest.mark.parametrize("name", FITS)
def test_fits_list_their_slots(name):
    found = sections(getattr(av.tl, name).__doc__)
    slots = [f"obsm['X_{name}'", f"obs['{name}_split']", f"uns['{name}']"]
    if name.endswith("anvi"):
        slots += [f"obs['{name}_prediction']", f"obs['{name}_confidence']", f"obsm['{name}_proba']"]
    assert all(slot in found["Returns"] for slot in slots)
    assert found["Returns"].startswith("Depending on `copy`, returns or updates `data`")
    assert "Raises" in found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("name", [name for name, file in zip(NAMES, FILES, strict=True) if ">>> " in file.read_text()])
def test_examples_run(name):
    """Every example in a docstring gives what it says."""
    module = importlib.import_module("anvi." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    import matplotlib

    matplotlib.use("Agg")
    with av.settings.override(verbosity=0):
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0


# names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["", "tl", "pp", "metrics", "pl", "nn", "get", "datasets"])
def test_all_is_sorted_and_complete(module):
    module = importlib.import_module(f"anvi.{module}".rstrip("."))
    constants_first = sorted(module.__all__, key=lambda name: (not name.isupper(), name))  # as isort has it
    assert module.__all__ in (sorted(module.__all__), constants_first)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith(module.__name__)
    }
    assert own <= set(module.__all__)


def test_everything_of_the_front_page_is_there():
    assert set(av.__all__) >= {"Model", "__version__", "datasets", "get", "metrics", "nn", "pl", "pp", "settings", "tl"}
    assert set(av.tl.__all__) >= {"latent", "predict", *FITS}
    assert {"model", "proba", "history"} <= set(av.get.__all__)


def test_settings():
    assert {"device", "progress", "verbosity", "data_dir"} <= set(vars(av.settings))
    with pytest.raises(AttributeError, match="settings has no option 'devise'; there are: device"):
        av.settings.devise = "cpu"
    before = vars(av.settings).copy()
    with pytest.raises(RuntimeError), av.settings.override(verbosity=0, device="cuda:1"):
        assert av.settings.verbosity == 0 and av.settings.device == "cuda:1"
        raise RuntimeError
    assert vars(av.settings) == before
    with pytest.raises(AttributeError), av.settings.override(verbosity=0, devise="cpu"):
        pass
    assert vars(av.settings) == before


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", av.__version__)


# files ------------------------------------------------------------------------------------------------------------


def code_lines(file: Path) -> int:
    """How many lines hold code."""
    return len(code_line_numbers(file))


def code_line_numbers(file: Path) -> set[int]:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    text = file.read_text()
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in ignored:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


@EVERY_FILE
def test_a_file_is_an_idea_and_fits_a_sitting(file):
    lines = len(file.read_text().splitlines())
    assert lines <= 600
    assert file.name == "__init__.py" or lines >= 60


@EVERY_FILE
def test_what_a_verb_hands_to_the_desk_are_its_arguments(file):
    """`ask(**locals())`: no variable of a verb takes the name of something else that the desk would believe."""
    from anvi.tl._ask import ask

    believed = set(inspect.signature(ask).parameters)
    for verb in [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]:
        calls = [node for node in ast.walk(verb) if isinstance(node, ast.Call) and ast.unparse(node.func) == "ask"]
        if calls and "**locals()" in ast.unparse(calls[0]):
            made = {n.id for n in ast.walk(verb) if isinstance(n, ast.Name) and n.lineno < calls[0].lineno}
            stored = {n.id for n in ast.walk(verb) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} & made
            assert not (stored & believed) - {argument.arg for argument in verb.args.args + verb.args.kwonlyargs}


# code lines that a folder may hold; raised only together with a line in the changelog
BUDGETS = {
    "": 2_685,
    "_data": 4_321,
    "_fit": 1_240,
    "_posterior": 2_275,
    "io": 1_068,
    "metrics": 1_016,
    "nn": 1_719,
    "pl": 2_134,
    "pp": 431,
    "tl": 1_891,
}


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_keeps_to_its_budget(folder):
    files = list((SOURCE / folder).glob("*.py"))
    assert len(files) <= 15  # fourteen and the __init__
    assert sum(map(code_lines, files)) <= BUDGETS[folder]


def test_every_folder_has_a_budget():
    assert {str(file.relative_to(SOURCE).parent).removeprefix(".") for file in FILES} == set(BUDGETS)


@EVERY_FILE
def test_a_file_says_what_it_is_for(file):
    assert ast.get_docstring(ast.parse(file.read_text()))


@EVERY_FILE
def test_what_no_file_may_hold(file):
    tree = ast.parse(file.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    front_door = file.name == "__main__.py"
    forbidden = {
        "eval",
        "exec",
        "torch.load",
        "torch.save",
        "pickle.load",
        "pickle.loads",
        "pickle.dump",
        "pickle.dumps",
    }
    forbidden |= {"torch.manual_seed", "np.random.seed", "mudata.set_options", "exit", "quit"}
    forbidden |= set() if front_door else {"print", "sys.exit"}
    assert not called & forbidden
    assert not top(imports(file, inside=True)) & {"pickle", "dill", "joblib", "lightning", "pyro", "dask"}


@EVERY_FILE
def test_the_global_random_state_is_nobodys(file):
    drawn = re.findall(r"np\.random\.(\w+)", file.read_text())
    assert set(drawn) <= {"default_rng", "SeedSequence", "Generator"}


def test_nothing_but_slots_writes_into_the_users_object():
    """Assignments to obs, obsm, uns, ... are in `_data/slots.py` (and where data are made, drawn or emptied)."""
    written = re.compile(r"\.(obs|obsm|uns|varm|varp|obsp|layers)\[[^]]+\] = ")
    found = [name for name, file in zip(NAMES, FILES, strict=True) if written.search(file.read_text())]
    allowed = {"_data/slots.py", "_data/minified.py", "datasets.py", "pp/panels.py", "pl/embedding.py"}
    assert set(found) <= allowed


MAY_LOOK_AT_THE_CONTAINER = {"_data/containers.py", "_data/slots.py", "_data/query.py", "_data/minified.py"}


def test_the_container_is_opened_in_few_files():
    """What a MuData is and what an AnnData is, `_data.containers.Source` knows, and the writer of slots."""
    checked = re.compile(r"isinstance\([^)]*\b(AnnData|MuData)\b")
    found = {name: len(checked.findall(file.read_text())) for name, file in zip(NAMES, FILES, strict=True)}
    inside = {name for name, n in found.items() if n and name.startswith(("_data/", "tl/", "metrics/", "_posterior/"))}
    assert inside <= MAY_LOOK_AT_THE_CONTAINER
    assert sum(n for name, n in found.items() if not name.startswith(("_data/", "pp/", "io/"))) <= CHECKS_OUTSIDE


CHECKS_OUTSIDE = 2  # of AnnData and MuData outside _data, pp and io


WALK = {"files": 36, "lines": 4_388}


def test_a_fit_is_a_short_walk():
    """Files and lines of functions that a fit enters, from the verb to the slots; raised with a changelog line only."""
    mdata, entered = av.datasets.synthetic_cite(300, n_genes=60), set()
    av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: entered.add(frame.f_code) if event == "call" else None)
    try:
        av.tl.totalanvi(mdata, batch_key="batch", max_epochs=1)
    finally:
        sys.setprofile(before)
    inside = {(code.co_filename, code.co_firstlineno) for code in entered if code.co_filename.startswith(str(SOURCE))}
    n_lines = 0
    for name in {name for name, _ in inside}:
        lines = code_line_numbers(Path(name))
        functions = [node for node in ast.walk(ast.parse(Path(name).read_text())) if isinstance(node, ast.FunctionDef)]
        starts = {min([node.lineno, *(one.lineno for one in node.decorator_list)]): node for node in functions}
        walked = [starts[line] for file, line in inside if file == name and line in starts]
        n_lines += len(lines & {line for node in walked for line in range(node.lineno, node.end_lineno + 1)})
    assert len({name for name, _ in inside}) <= WALK["files"]
    assert n_lines <= WALK["lines"]


def test_config_is_json_able():
    config = Config(n_genes=3, n_categories=(2, 3))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert np.isscalar(config.prior_floor)


@pytest.mark.parametrize("folder", ["_data", "_fit", "_posterior", "nn", "tl", "metrics", "io", "pp", "pl"])
def test_a_folder_says_what_its_files_are(folder):
    """The docstring of a folder's `__init__` is its listing: the README names folders only."""
    listing = ast.get_docstring(ast.parse((SOURCE / folder / "__init__.py").read_text()))
    files = {file.stem for file in (SOURCE / folder).glob("*.py")} - {"__init__"}
    assert sorted(name for name in files if f"{name} " not in listing) == []


# docs -------------------------------------------------------------------------------------------------------------

DOCS, TUTORIALS = (SOURCE.parents[1] / name for name in ("docs", "tutorials"))  # the build copies these into those


def listed(page: Path) -> set[Path]:
    """The pages that the toctrees of a page name."""
    trees = re.findall(r"```{toctree}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    names = [line.strip() for tree in trees for line in tree.splitlines() if line.strip() and not line.startswith(":")]
    found = [page.parent / f"{name}{suffix}" for name in names for suffix in (".md", ".ipynb")]
    found = [TUTORIALS / path.name if path.parent == DOCS / "tutorials" else path for path in found]
    return {path.resolve() for path in found if path.is_file()}


def test_every_page_is_in_a_toctree():
    pages = [path.resolve() for kind in ("*.md", "*.ipynb") for top in (DOCS, TUTORIALS) for path in top.rglob(kind)]
    built = {"_build", "jupyter_execute", ".ipynb_checkpoints"}
    pages = {path for path in pages if not built & set(path.parts) and path.parent != DOCS / "tutorials"}
    reached = {(DOCS / "index.md").resolve()}
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        new = listed(page) - reached if page.suffix == ".md" else set()
        reached |= new
        waiting += new
    lost = sorted(str(path.relative_to(DOCS.parent.resolve())) for path in pages - reached)
    assert not lost, f"name these in a toctree, such as that of docs/user_guide.md: {', '.join(lost)}"


def test_the_api_page_lists_every_public_name():
    page = (DOCS / "api.md").read_text("utf-8")
    shown = re.findall(r"^    ((?:\w+\.)?\w+)$", page, re.MULTILINE)
    assert len(shown) == len(set(shown))
    wanted = {"Model", "settings.Settings"}
    for namespace in (*NAMESPACES, "io", "nn", "datasets"):
        module = getattr(av, namespace)
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")
        ]
        wanted |= {f"{namespace}.{name}" for name in names if callable(getattr(module, name))}
    assert set(shown) == wanted, "docs/api.md lists what is public, each on a line of its own"
