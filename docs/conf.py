"""How Sphinx builds the site: `python -m sphinx -W -b html docs docs/_build`, with network or without."""

import importlib
import os
import re
import warnings
import zlib
from datetime import date
from importlib.metadata import metadata
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.ext import intersphinx

from anvi.__main__ import COMMANDS, _parser

HERE = Path(__file__).parent

# the tutorials lie beside this folder; Sphinx wants them inside, where links to its pages are shorter
(HERE / "tutorials").mkdir(exist_ok=True)
for page in sorted((HERE.parent / "tutorials").iterdir()):
    if page.suffix in (".ipynb", ".md"):
        (HERE / "tutorials" / page.name).write_text(page.read_text("utf-8").replace("(../docs/", "(../"), "utf-8")

# what the page of the command line shows of each command
(HERE / "generated").mkdir(exist_ok=True)
os.environ["COLUMNS"] = "80"  # by which argparse breaks lines
for command in COMMANDS:
    commands = next(one for one in _parser([command])._actions if isinstance(one.choices, dict))
    (HERE / "generated" / f"command_{command}.txt").write_text(commands.choices[command].format_help(), "utf-8")

project = "anvi"
author = "The anvi developers"
copyright = f"{date.today():%Y}, {author}"
release = metadata("anvi")["Version"]
version = release.split("+")[0]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxext.opengraph",
]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
nitpicky = True  # a reference that leads nowhere is a warning, and a warning is an error in CI
smartquotes_action = "De"  # dashes; "auto" is what one types
default_role = "literal"  # of docstrings, whose `single backticks` are code
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

# pages: Markdown, and notebooks as they were stored
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 3
myst_all_links_external = False
nb_execution_mode = "off"
nb_merge_streams = True

# API pages, from the docstrings
autosummary_generate = True
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_custom_sections = ["Returns"]  # prose and lists of slots, which are no types
typehints_defaults = None
typehints_document_rtype = False
always_use_bars_union = True

# other projects: their inventories where there is a network, else the few names that our pages refer to
EXTERNAL = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", {"anndata.AnnData": "generated/anndata.AnnData.html"}),
    "matplotlib": (
        "https://matplotlib.org/stable/",
        {
            "matplotlib.axes.Axes": "api/_as_gen/matplotlib.axes.Axes.html",
            "matplotlib.colors.Colormap": "api/_as_gen/matplotlib.colors.Colormap.html",
            "matplotlib.figure.Figure": "api/_as_gen/matplotlib.figure.Figure.html",
        },
    ),
    "mudata": ("https://mudata.readthedocs.io/stable/", {"mudata.MuData": "generated/mudata.MuData.html"}),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {
            "numpy.ndarray": "reference/generated/numpy.ndarray.html",
            "numpy.random.Generator": "reference/random/generator.html",
        },
    ),
    "pandas": (
        "https://pandas.pydata.org/docs/",
        {
            "pandas.DataFrame": "reference/api/pandas.DataFrame.html",
            "pandas.Series": "reference/api/pandas.Series.html",
        },
    ),
    "python": (
        "https://docs.python.org/3/",
        {
            **{name: f"library/stdtypes.html#{name}" for name in ("dict", "list", "tuple", "str", "set")},
            **{name: f"library/functions.html#{name}" for name in ("bool", "float", "int", "object", "type")},
            **{
                name: f"library/exceptions.html#{name}"
                for name in (
                    "AttributeError",
                    "FileExistsError",
                    "FileNotFoundError",
                    "FloatingPointError",
                    "ImportError",
                    "KeyError",
                    "NotImplementedError",
                    "OSError",
                    "RuntimeError",
                    "TypeError",
                    "ValueError",
                )
            },
            **{
                f"collections.abc.{name}": f"library/collections.abc.html#collections.abc.{name}"
                for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
            },
            "None": "library/constants.html#None",
            "os.PathLike": "library/os.html#os.PathLike",
            "pathlib.Path": "library/pathlib.html#pathlib.Path",
            **{
                f"typing.{name}": f"library/typing.html#typing.{name}"
                for name in ("Any", "Literal", "NamedTuple", "Unpack", "Annotated")
            },
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "torch.Tensor": "tensors.html#torch.Tensor",
            "torch.Generator": "generated/torch.Generator.html",
            "torch.device": "tensor_attributes.html#torch.device",
            "torch.nn.Module": "generated/torch.nn.Module.html",
        },
    ),
    "scanpy": (
        "https://scanpy.readthedocs.io/en/stable/",
        {"scanpy.pl.embedding": "generated/scanpy.pl.embedding.html"},
    ),
    "xarray": (
        "https://docs.xarray.dev/en/stable/",
        {
            "xarray.DataArray": "generated/xarray.DataArray.html",
            "xarray.Dataset": "generated/xarray.Dataset.html",
        },
    ),
}
DATA = {"None", "typing.Any", "typing.Literal", "typing.Unpack", "typing.Annotated"}


def known_names() -> dict[str, tuple]:
    """The mapping of intersphinx, each with an inventory of our own to fall back to."""
    folder = HERE / "_build" / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for name, (address, objects) in EXTERNAL.items():
        lines = []
        for target, uri in objects.items():
            function = target.split(".")[-1].islower() and target.count(".") == 2
            kind = "exception" if target.endswith("Error") else "data" if target in DATA else "class"
            kind = "function" if function else kind
            lines.append(f"{target} py:{kind} 1 {uri} -\n")
        header = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
        header += "# The remainder of this file is compressed using zlib.\n"
        file = folder / f"{name}.inv"
        file.write_bytes(header.encode() + zlib.compress("".join(lines).encode()))
        mapping[name] = (address, (None, str(file)))
    return mapping


intersphinx_mapping = known_names()
intersphinx_timeout = 5

# where a class is defined and where it is documented
ALIASES = {
    "anvi._model.Model": "anvi.Model",
    "anvi.nn.config.Batch": "anvi.nn.Batch",
    "anvi.nn.config.Config": "anvi.nn.Config",
    "anvi.nn.config.Entries": "anvi.nn.Entries",
    "anvi.nn.layers.Draws": "anvi.nn.Draws",
    "anvi.nn.layers.Gaussian": "anvi.nn.Gaussian",
    "anvi.nn.objective.Weights": "anvi.nn.Weights",
    "anvi.nn.vae.Terms": "anvi.nn.Terms",
    "anvi.nn.vae.VAE": "anvi.nn.VAE",
    "anvi.pp.check.Report": "anvi.pp.Report",
    "mudata._core.mudata.MuData": "mudata.MuData",
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "np.ndarray": "numpy.ndarray",
    "pd.DataFrame": "pandas.DataFrame",
    "pd.Series": "pandas.Series",
    "xr.Dataset": "xarray.Dataset",
    "xarray.core.dataset.Dataset": "xarray.Dataset",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.core.series.Series": "pandas.Series",
    "pathlib._local.Path": "pathlib.Path",
    "matplotlib.axes._axes.Axes": "matplotlib.axes.Axes",
    "numpy.random._generator.Generator": "numpy.random.Generator",
    "torch._C.Generator": "torch.Generator",
    "xarray.core.dataarray.DataArray": "xarray.DataArray",
}

html_math_renderer = "mathml"  # below; what browsers draw without a script and without a network
html_theme = "sphinx_book_theme"
html_title = "anvi"
html_static_path = ["_static"]
html_css_files = ["anvi.css"]
html_show_sourcelink = False
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_persistent": [],
}
ogp_site_url = "https://anvi.readthedocs.io/"
ogp_enable_meta_description = True
ogp_social_cards = {"enable": False}


# classes of the inside that a signature names and no page is about
nitpick_ignore_regex = [(r"py:.*", r"anvi\.(_\w+|tl\._\w+|nn\.\w+)\..*")]

warnings.filterwarnings("ignore", message=".*_RstSnippetParser.set_application.*")


def find_alias(app, env, node, contnode):
    """Resolve a name under which a thing is defined, or its last part, by the name under which it is documented."""
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    inside = [name for name in domain.objects if name.startswith("anvi.") and name.endswith(f".{target}")]
    name = ALIASES.get(target, inside[0] if len(inside) == 1 else None)
    if node.get("refdomain") != "py" or name is None:
        return None
    node["reftarget"] = name
    if name in domain.objects:
        kind = domain.objects[name].objtype
        role = domain.role_for_objtype(kind)
        return domain.resolve_xref(env, node["refdoc"], app.builder, role, name, node, contnode)
    return intersphinx.missing_reference(app, env, node, contnode)


AS_WRITTEN = {}


def keep_as_written(app, what, name, obj, options, lines):
    """Note the docstring of an attribute, before napoleon takes what is before its first colon for a type."""
    if what in ("attribute", "data", "property"):
        AS_WRITTEN[name] = list(lines)


def put_back(app, what, name, obj, options, lines):
    """Put the docstring of an attribute back, and take away the colon that typehints puts under "Returns"."""
    if name in AS_WRITTEN:
        lines[:] = AS_WRITTEN[name]
    for i in range(2, len(lines)):
        if lines[i - 2] == ".. rubric:: Returns":
            lines[i] = lines[i].removeprefix(":").lstrip()


ABOUT = """# anvi

> anvi fits scVI, scANVI, totalVI and TotalANVI to single-cell RNA and CITE-seq counts in a MuData or AnnData, with
> verbs in the manner of scanpy (`import anvi as av; av.tl.totalanvi(mdata)`), and writes latent space, predicted cell
> types and the model itself into slots of that object. It has nothing to do with the microbial platform anvi'o.

"""


def write_llms_txt(app, exception):
    """Write the pages and functions, each with its line, as language models are given a site (llms.txt)."""
    if exception is not None or app.builder.name != "html":
        return
    guide = (HERE / "user_guide.md").read_text("utf-8") + (HERE / "tutorials" / "index.md").read_text("utf-8")
    parts = {"Guide": [], "API": []}
    for titles, text in re.findall(r"^\| (\[.+?\)) \| (.+?) \|$", guide, re.MULTILINE):
        for title, page in re.findall(r"\[(.+?)\]\(([\w/]+)\.(?:md|ipynb)\)", titles):
            folder = "" if (HERE / f"{page}.md").is_file() else "tutorials/"
            line = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", text)  # links as their words
            parts["Guide"].append(f"- [{title}]({ogp_site_url}{folder}{page}.html): {line}")
    for name, found in sorted(app.env.get_domain("py").objects.items()):
        if found.docname == f"generated/{name}":
            module, _, last = name.rpartition(".")
            thing = getattr(importlib.import_module(module), last)
            line = (thing.__doc__ or "").strip().splitlines()[0]
            parts["API"].append(f"- [{name}]({ogp_site_url}{found.docname}.html): {line}")
    text = ABOUT + "\n\n".join(f"## {title}\n\n" + "\n".join(lines) for title, lines in parts.items()) + "\n"
    (Path(app.outdir) / "llms.txt").write_text(text, encoding="utf-8")


def write_formula(translator, node):
    """Write a formula as MathML, by docutils' own converter; what that does not know is an error of the build."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("build-finished", write_llms_txt)
    app.connect("missing-reference", find_alias)
    app.connect("autodoc-process-docstring", keep_as_written, priority=400)  # napoleon's has 500
    app.connect("autodoc-process-docstring", put_back, priority=600)
