"""Which antibody of one kit is which of another: names under one stated normalisation, and a table of synonyms.

A name loses, in this order, what says nothing of the target: spelling (Unicode compatibility forms, trade marks, spaces
of any width), prefixes (`prot:`, `adt_`, `CITE_`, `GRCh38_`, `TotalSeq-B0034`, `anti-human`, `Hu.`), suffixes
(`_TotalSeqB`, `_TotalC`, `:AB`, `_PROT`, `-ADT`, `-A0034`, `(human)`, `Recombinant`, an oligonucleotide). A clone in
brackets, or behind a known target (`CD3_UCHT1`, `CD4-2`), is taken off and kept; another species
(`anti-mouse CD4`, `CD4 (mouse)`) makes another target. What is left is compared without case, Greek letters as Latin
ones, without spaces and hyphens other than those between two digits; then by its target in `TARGETS`.

Two names are one antibody if they are the same text, else if they are the same under this normalisation, else if they
name the same target; a clone (or the species of an isotype control) must be the same where both name one. Where more
than one name of a kit could be meant, none is taken.
"""

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import pandas as pd

from .containers import UNSEEN, listed

logger = logging.getLogger("anvi")

MOST_FEATURES = 0.8
"""Share of a model's genes or proteins in a query below which the log warns."""

TARGETS = """
CD1a; CD1b; CD1c, BDCA-1; CD1d; CD2, LFA-2; CD3, CD3E; CD4; CD5; CD6; CD7; CD8, CD8a; CD8b; CD9; CD10, MME, CALLA
CD11a, ITGAL; CD11b, ITGAM, Mac-1; CD11c, ITGAX; CD13, ANPEP; CD14; CD15, FUT4, SSEA-1, Lewis X; CD16, CD16a, FCGR3A
CD18, ITGB2; CD19; CD20, MS4A1; CD21, CR2; CD22, Siglec-2; CD23, FCER2; CD24; CD25, IL2RA, IL-2R alpha; CD26, DPP4
CD27, TNFRSF7; CD28; CD29, ITGB1, integrin beta 1; CD30, TNFRSF8; CD31, PECAM1, PECAM; CD32, FCGR2A; CD33, Siglec-3
CD34; CD35, CR1; CD36; CD37; CD38; CD39, ENTPD1; CD40, TNFRSF5; CD41, ITGA2B; CD42b, GP1BA; CD43, SPN; CD44
CD45, PTPRC; CD45R, B220; CD45RA; CD45RB; CD45RO; CD46; CD47; CD48, SLAMF2; CD49a, ITGA1; CD49b, ITGA2; CD49c, ITGA3
CD49d, ITGA4; CD49e, ITGA5; CD49f, ITGA6; CD50, ICAM3; CD51, ITGAV; CD52; CD54, ICAM1; CD55, DAF; CD56, NCAM1, NCAM
CD57, B3GAT1, HNK-1; CD58, LFA-3; CD59; CD61, ITGB3; CD62E, SELE, E-selectin; CD62L, SELL, L-selectin
CD62P, SELP, P-selectin; CD63; CD64, FCGR1A; CD66b, CEACAM8; CD69; CD70, TNFSF7; CD71, TFRC; CD72; CD73, NT5E; CD74
CD77, Gb3; CD79a; CD79b; CD80, B7-1; CD81; CD82; CD83; CD84, SLAMF5; CD85g, LILRA4, ILT7; CD85j, LILRB1, ILT2
CD85k, LILRB4, ILT3; CD86, B7-2; CD87, PLAUR; CD88, C5AR1, C5aR; CD89, FCAR; CD90, THY1; CD93; CD94, KLRD1; CD95, FAS
CD96, TACTILE; CD98, SLC3A2; CD99; CD100, SEMA4D; CD101; CD102, ICAM2; CD103, ITGAE; CD104, ITGB4
CD105, ENG, Endoglin; CD106, VCAM1; CD107a, LAMP1; CD107b, LAMP2; CD109; CD110, MPL; CD111, NECTIN1; CD112, NECTIN2
CD115, CSF1R, M-CSFR; CD116, CSF2RA; CD117, KIT, c-Kit; CD119, IFNGR1; CD120a, TNFRSF1A, TNFR1
CD120b, TNFRSF1B, TNFR2; CD122, IL2RB; CD123, IL3RA; CD124, IL4R, IL-4R alpha; CD126, IL6R; CD127, IL7R, IL-7R alpha
CD129, IL9R; CD130, IL6ST, gp130; CD131, CSF2RB; CD132, IL2RG; CD133, PROM1; CD134, TNFRSF4, OX40; CD135, FLT3
CD137, TNFRSF9, 4-1BB; CD138, SDC1, Syndecan-1; CD140a, PDGFRA; CD140b, PDGFRB; CD141, THBD, BDCA-3, Thrombomodulin
CD142, F3, Tissue factor; CD144, CDH5, VE-cadherin; CD146, MCAM; CD147, BSG, Basigin; CD150, SLAMF1, SLAM; CD151
CD152, CTLA4; CD154, CD40LG, CD40L; CD155, PVR; CD158e1, KIR3DL1; CD161, KLRB1; CD162, SELPLG, PSGL-1; CD163; CD164
CD166, ALCAM; CD169, SIGLEC1; CD172a, SIRPA; CD177; CD178, FASLG, FasL; CD180; CD181, CXCR1; CD182, CXCR2
CD183, CXCR3; CD184, CXCR4; CD185, CXCR5; CD186, CXCR6; CD191, CCR1; CD192, CCR2; CD193, CCR3; CD194, CCR4
CD195, CCR5; CD196, CCR6; CD197, CCR7; CD199, CCR9; CD200; CD200R, CD200R1; CD201, PROCR, EPCR; CD202b, TEK, TIE2
CD204, MSR1; CD205, LY75, DEC-205; CD206, MRC1, MMR; CD207, Langerin; CD208, LAMP3, DC-LAMP; CD209, DC-SIGN
CD210, IL10RA; CD218a, IL18R1; CD221, IGF1R; CD223, LAG3; CD226, DNAM-1; CD229, LY9; CD235a, GYPA, Glycophorin A
CD244, 2B4, SLAMF4; CD252, TNFSF4, OX40L; CD253, TNFSF10, TRAIL; CD254, TNFSF11, RANKL; CD258, TNFSF14, LIGHT
CD267, TNFRSF13B, TACI; CD268, TNFRSF13C, BAFF-R; CD269, TNFRSF17, BCMA; CD270, TNFRSF14, HVEM; CD271, NGFR
CD272, BTLA; CD273, PDCD1LG2, PD-L2, B7-DC; CD274, PD-L1, B7-H1; CD275, ICOSLG, ICOSL, B7-H2; CD276, B7-H3
CD278, ICOS; CD279, PDCD1, PD-1; CD282, TLR2; CD284, TLR4; CD294, PTGDR2, CRTH2; CD301, CLEC10A; CD303, CLEC4C, BDCA-2
CD304, NRP1, Neuropilin-1, BDCA-4; CD305, LAIR1; CD307d, FCRL4; CD307e, FCRL5; CD309, KDR, VEGFR2; CD314, KLRK1, NKG2D
CD317, BST2, Tetherin; CD319, SLAMF7, CRACC; CD321, F11R, JAM-A; CD324, CDH1, E-cadherin; CD325, CDH2, N-cadherin
CD326, EPCAM; CD328, SIGLEC7; CD329, SIGLEC9; CD335, NCR1, NKp46; CD336, NCR2, NKp44; CD337, NCR3, NKp30; CD338, ABCG2
CD340, ERBB2, HER2; CD352, SLAMF6, NTB-A; CD357, TNFRSF18, GITR; CD360, IL21R; CD365, HAVCR1, TIM-1
CD366, HAVCR2, TIM-3; CD369, CLEC7A, Dectin-1; CD370, CLEC9A; CD371, CLEC12A; KLRG1; TIGIT; CX3CR1; XCR1; CCR10
Siglec-8; Siglec-10; Podoplanin, PDPN; GARP, LRRC32; VISTA, VSIR; GPR56, ADGRG1; Integrin beta 7, ITGB7
FceRIa, FCER1A; LOX-1, OLR1; TSLPR, CRLF2; IgM, IGHM; IgD, IGHD; B2M, beta2-microglobulin; HLA-A,B,C; HLA-A2; HLA-E
HLA-F; HLA-DR, HLA-DRA; TCR alpha/beta; TCR gamma/delta; TCR V alpha 7.2; TCR V delta 2; TCR V gamma 9; Notch1
MERTK, MerTK; Galectin-9, LGALS9; TIM-4, TIMD4
"""
"""One target an entry: its common name, then symbols of the HUGO Gene Nomenclature Committee and other common names.

Written from the two public nomenclatures, that of genes (genenames.org) and that of CD molecules (hcdm.org). CD45 and
its isoforms are targets of their own: antibodies tell them apart.
"""

ISOTYPE_CLONES = {
    "MOPC-21": "mouse IgG1",
    "MOPC-173": "mouse IgG2a",
    "MPC-11": "mouse IgG2b",
    "RTK2071": "rat IgG1",
    "RTK2758": "rat IgG2a",
    "RTK4530": "rat IgG2b",
    "HTK888": "hamster IgG",
}
"""Clones that are sold as isotype controls (vendors' public sheets), for names that give nothing else."""

SAME, NORMALISED, SYNONYM, STATED = "same name", "normalised name", "same target", "stated"
"""How a pair was found, from the surest on; `STATED`: the user said so."""
AMBIGUOUS = "ambiguous"
"""How no pair was found although there is one: the reason follows."""

_PREFIX = re.compile(
    r"(?:prot|protein|adt|cite|citeseq|antibody|csp|surface|cell[ _\-]surface)[:_.\- ]+|ab[:_.\-]"
    r"|(?:GRCh3[78]|hg19|hg38)[:_\-]+|[haα]-?(?=CD\d)|antihuman[ _.\-]+|totalseq[ _\-]*[abcd]?(?:\d{4})?[ _\-:]+"
    r"|[abcd]\d{4}[ _\-]|anti[ _.\-]+(?:mouse[/ ]human|human[/ ]mouse)[ _.\-]+|anti[ _.\-]+|human[/ ]mouse[ _.\-]+"
    r"|mouse[/ ]human[ _.\-]+|human[ _.\-]+|hu(?:ms)?(?:rt)?[._]|hu[ \-]",
    re.IGNORECASE,
)
_SUFFIX = re.compile(
    r"[ _.:\-]*total(?:seq)?[ _\-]*[abcd](?:\d{4})?|[ _.:\-]*totalseq|[ _\-]ts[abcd]|[ _\-][abcd]\d{4}|[:_]ab"
    r"|[:_.\- |]+(?:protein|prot|adt|cite|antibody|pabo|surface|recombinant|(?:anti[ _.\-])?human)"
    r"|[ _]*\((?:anti[ \-])?(?:mouse/)?human(?:/mouse)?\)",
    re.IGNORECASE,
)
_OLIGO = re.compile(r"[ _\-:](?:[ACGTN]{8,})")
_BRACKETS = re.compile(r"(.*\S)\s*[(\[]\s*([^()\[\]]+?)\s*[)\]]")
_CLONE = re.compile(r"(.*?)[ _,;\-]+clone[ _:.\-]*(\S.*)", re.IGNORECASE)
_TAIL = re.compile(r"[1-9]|\d{3}|(?=.*[A-Z])(?=.*\d)(?!CD\d)[A-Z0-9][A-Za-z0-9./\-]{2,}")  # behind a target: a clone
_INSIDE = re.compile(r"[1-9]|(?=.*\d)(?!CD\d)[A-Za-z0-9./\-]{2,}")  # the same in brackets
_NO_TARGET = re.compile(
    r"(?:(?:anti[ _.\-]+)?(?:mouse|ms|rat)[ _.\-]+)?(?:hash(?:[ _\-]?tags?)?|hto|cmo|multiplexing[ _]capture"
    r"|sample[ _\-]?tag)(?:[ _\-.#]*(?:[A-Z]?\d+|[A-Z]))?(?:[ _\-].*)?"
    r"|unmapped|unassigned|no[ _]match|bad[ _]struct|total[ _]reads",
    re.IGNORECASE,
)
_GREEK = {"alpha": "a", "beta": "b", "gamma": "g", "delta": "d", "epsilon": "e"}
_GREEK |= dict(zip("αβγδε", "abgde", strict=True)) | {"κ": "kappa", "λ": "lambda", "μ": "mu"}
_SPECIES = {"mouse": "mouse", "ms": "mouse", "rat": "rat", "rt": "rat", "hamster": "hamster", "armenian": "hamster"}
_FIRST = re.compile(r"(?P<species>mouse|ms|rat)[ ._\-]+(?P<rest>\S.*)", re.IGNORECASE)
# CD4 (mouse), CD4_mouse
_LAST = re.compile(r"(?P<rest>\S.*?)[ _.\-(\[]+(?:anti[ _.\-])?(?P<species>mouse|rat)[)\]]?", re.IGNORECASE)
_CLASS = re.compile(r"\big ?(g[ ]?(?:1|2a|2b|2c|3|4)?|m|a|d|e)(?![a-z0-9])")
_CONTROL = re.compile(r"\b(?:isotype|iso|ctrl|ctl|control|isotypectrl|isotypecontrol)\b")


class Antibody(NamedTuple):
    """What a name says."""

    plain: str  # the name without affixes, as the user wrote it
    normalised: str  # what is compared, without clone
    target: str | None  # in `TARGETS`, or the class of an isotype control; None: unknown
    clone: str | None
    species: str | None  # of an isotype control
    isotype: bool


def match_antibodies(query_names: Sequence[str], model_names: Sequence[str]) -> pd.DataFrame:
    """Find each antibody of a query among those of a model (or of another kit): one to one, and never by a guess.

    Parameters
    ----------
    query_names, model_names
        Names, each of them unique.

    Returns
    -------
    DataFrame of one row a name of the query: `name`; `normalised`, `target`, `clone` and `isotype`, what the name says;
    `matched_to`, the model's name, None without one; `how`, the rule, or the reason why there is none.
    """
    ours, theirs = list(map(str, query_names)), list(map(str, model_names))
    read = {name: read_antibody(name) for name in {*ours, *theirs}}
    partner: dict[str, str] = {}
    how = dict.fromkeys(ours, "")
    left, right = ours, theirs
    for rule, key, agree in _RULES:
        options, claims = defaultdict(list), defaultdict(list)
        groups = defaultdict(list)
        for name in right:
            groups[key(name, read[name])].append(name)
        for name in left:
            for other in groups[key(name, read[name])]:
                if key(name, read[name]) is not None and agree(read[name], read[other]):
                    options[name].append(other)
                    claims[other].append(name)
        for name, others in options.items():
            rivals = claims[others[0]]
            if len(others) == len(rivals) == 1:
                partner[name], how[name] = others[0], rule
            elif len(others) == 1:
                how[name] = f"{AMBIGUOUS}: {listed(map(repr, rivals))} could all be '{others[0]}'"
            else:
                how[name] = f"{AMBIGUOUS}: could be {listed(map(repr, others))}"
        left = [name for name in left if name not in options]
        right = [name for name in right if name not in claims]
    taken = {other: one for one, other in partner.items()}
    for name in left:
        how[name] = _why_not(read[name], theirs, read, taken)
    rows = []
    for name in ours:
        part = read[name]
        rows.append((name, part.normalised, part.target, part.clone, part.isotype, partner.get(name), how[name]))
    columns = ["name", "normalised", "target", "clone", "isotype", "matched_to", "how"]
    table = pd.DataFrame(rows, columns=columns).astype({"isotype": bool, "matched_to": object})
    return table.where(table.notna(), None)


def _why_not(part: Antibody, theirs: list[str], read: dict[str, Antibody], taken: dict[str, str]) -> str:
    """Why an antibody whose target the other kit has was not matched; "" where it has none."""
    for name in theirs:
        if part.target is not None and read[name].target == part.target:
            if name in taken:
                return f"another name of '{name}', which '{taken[name]}' is already"
            return f"another {'species' if part.isotype else 'clone'} than '{name}'"
    return ""


def _alike(one: Antibody, other: Antibody) -> bool:
    """Whether neither clone nor species speaks against two names."""
    both = ((one.clone, other.clone), (one.species, other.species))
    return all(a is None or b is None or _key(a) == _key(b) for a, b in both)


def _equal(one: Antibody, other: Antibody) -> bool:
    """Whether both names say the same of clone and species."""
    return _alike(one, other) and (one.clone is None, one.species is None) == (
        other.clone is None,
        other.species is None,
    )


_RULES = (
    (SAME, lambda name, _: name, lambda *_: True),
    (NORMALISED, lambda _, part: part.normalised, _equal),
    (SYNONYM, lambda _, part: part.target, _equal),
    (SYNONYM, lambda _, part: part.target or part.normalised, _alike),
)


def same_antibodies(name: str, names: Sequence[str]) -> list[str]:
    """Names that are the same as one under the normalisation; synonyms do not count, for genes may be such."""
    part = read_antibody(name)
    there = {other: read_antibody(other) for other in names}
    return [other for other, found in there.items() if found.normalised == part.normalised and _alike(part, found)]


def renamed(names: Sequence[str], like: Sequence[str]) -> list[str]:
    """Names, each under that of its partner in another kit where it has one."""
    names = list(map(str, names))
    if set(like) <= set(names) or set(names) <= set(like):  # nothing is left to be found
        return names
    table = match_antibodies(names, like)
    return list(table["matched_to"].where(table["matched_to"].notna(), table["name"]))


def match_kits(kits: Mapping[str, Sequence[str]], stated: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Match the antibodies of several kits, one kit after the other to all before it; the first name stays.

    An antibody without a partner keeps its own name, without affixes where that name is free; an isotype control is
    called by its class.

    Parameters
    ----------
    kits
        Names of each kit.
    stated
        For some names, what they are to be called: the user's word, before any rule.

    Returns
    -------
    The table of :func:`match_antibodies` of all kits, `kit` before it and `new_name` behind it.

    Raises
    ------
    ValueError
        If the user gives two antibodies of a kit one name.
    """
    stated = stated or {}
    known: list[str] = []
    tables = []
    for kit, names in kits.items():
        said = [stated.get(name, name) for name in names]
        if len(set(said)) < len(said):
            twice = next(name for name in said if said.count(name) > 1)
            both = listed(repr(name) for name in names if stated.get(name, name) == twice)
            raise ValueError(f"harmonize calls {both} of '{kit}' all '{twice}'; two clones need two names.")
        table = match_antibodies(said, known)
        plain = [name if name in stated.values() else read_antibody(name).plain for name in said]
        new_name = [
            match or (short if plain.count(short) == 1 and short not in known else name)
            for name, short, match in zip(said, plain, table["matched_to"], strict=True)
        ]
        table["how"] = [
            STATED if name in stated and (how in ("", SAME)) else how or twin
            for name, how, twin in zip(names, table["how"], _twins(table), strict=True)
        ]
        table["name"], table["new_name"] = list(names), new_name
        table.insert(0, "kit", kit)
        tables.append(table)
        known += [name for name in new_name if name not in known]
    return pd.concat(tables, ignore_index=True)


def _twins(table: pd.DataFrame) -> list[str]:
    """Of each antibody, which others of the same kit have its target and clone."""
    rows, names = list(zip(table["name"], table["target"], table["clone"], strict=True)), defaultdict(list)
    for name, *said in rows:
        names[tuple(said)].append(name)
    others = ([other for other in names[target, clone] if target and other != name] for name, target, clone in rows)
    return [f"kept apart from {listed(map(repr, found))} of the same kit" if found else "" for found in others]


def split_targets(names: Sequence[str], panels: Sequence[str], measured: Sequence[Sequence[bool]]) -> str | None:
    """What to say of antibodies that stand in several columns under several names; None if there are none."""
    if len(panels) < 2:
        return None
    kits = {
        panel: [name for name, seen in zip(names, row, strict=True) if seen]
        for panel, row in zip(panels, measured, strict=True)
    }
    found = match_kits({panel: kit for panel, kit in kits.items() if kit})
    several = found.groupby("new_name")["name"].transform("nunique") > 1  # not one name that every kit has
    split = found[several & found["how"].isin((NORMALISED, SYNONYM))].rename(columns={"name": "name_"})
    unclear = found[found["how"].str.startswith(AMBIGUOUS)]
    pairs = [f"'{row.name_}' of '{row.kit}' is '{row.matched_to}'" for row in split.itertuples()]
    if not pairs and unclear.empty:
        return None
    if not pairs:
        name, kit, how = unclear[["name", "kit", "how"]].iloc[0]
        return (
            f"{len(unclear)} antibodies may stand in several columns: '{name}' of '{kit}' is {how}. "
            'pp.panels(mdata, panel_key, harmonize="show") shows which; harmonize={name: ...} says what is what.'
        )
    joins = "pp.panels(mdata, panel_key, harmonize=True) joins them, "
    if len(unclear):
        joins = f"{', '.join(map(repr, unclear['name'][:4]))} may be several: pp.panels(mdata, panel_key, "
        joins += "harmonize={name: ...}) says what is what and joins them, "
    return (
        f"{len(split)} antibodies stand in two columns under two names and are learned as two proteins: "
        f'{"; ".join(pairs[:4])}{"; ..." if len(pairs) > 4 else ""}. {joins}harmonize="show" shows how.'
    )


@cache
def read_antibody(name: str) -> Antibody:
    """Take a name apart."""
    plain, says_anti = _without_affixes(name)
    text, clone = plain, None
    if "|" in text:  # BD: target:clone|gene|number
        text, _, clone = text.split("|")[0].partition(":")
    if clone is None and (found := _CLONE.fullmatch(text.replace("(", " ").replace(")", " ").strip())):
        text, clone = found.groups()
    isotype = _isotype(text, says_anti)
    if isotype is not None:
        species, name_of_class, said = isotype
        shown = " ".join(filter(None, (species, name_of_class)))
        plain = shown if name_of_class.startswith("IgG") else f"{shown} isotype"  # IgM is a target, too
        return Antibody(plain, f"{shown.casefold()} isotype", f"{name_of_class} isotype", clone or said, species, True)
    target, text, clone = _target(text, clone)
    return Antibody(plain, _key(text), target, clone or None, None, False)


def names_no_target(name: str) -> bool:
    """Whether a name says that its column holds a sample's tag (hashtags, CellPlex) or reads that had no antibody."""
    plain = read_antibody(name).plain
    return _NO_TARGET.fullmatch(plain) is not None or _NO_TARGET.fullmatch(name) is not None


def _without_affixes(name: str) -> tuple[str, bool]:
    """A name without what says nothing of the target; and whether it said "anti"."""
    text = unicodedata.normalize("NFKC", re.sub("[™®©]", "", name).translate(UNSEEN))
    text = " ".join(re.sub("[\u2010-\u2015\u2212]", "-", text).split())
    says_anti = re.match(r"(?:.*[ _:\-])?anti[ _.\-]", text, re.IGNORECASE) is not None
    while True:
        shorter = text
        for pattern in (_SUFFIX, _OLIGO):
            ends = [m for m in pattern.finditer(shorter) if m.end() == len(shorter) and m.start() > 0]
            shorter = shorter[: ends[0].start()] if ends else shorter
        begin = _PREFIX.match(shorter)
        shorter = shorter[begin.end() :] if begin and begin.end() < len(shorter) else shorter
        if shorter == text:
            return text, says_anti
        text = shorter


def _isotype(text: str, says_anti: bool) -> tuple[str | None, str, str | None] | None:
    """Species, class and clone of an isotype control; None for anything else."""
    words = re.sub(r"[_.:\-/,()\[\]]+", " ", text.casefold())
    control = _CONTROL.search(words) is not None
    species = next((_SPECIES[word] for word in words.split() if word in _SPECIES), None)
    found = _CLASS.search(words)
    if found is None:
        if not re.search(r"\bisotype", words):
            return None
        for clone, what in ISOTYPE_CLONES.items():
            if _key(clone) in _key(text):
                species, kind = what.split()
                return species, kind, clone
        return species, "unknown", None
    kind = found[1].replace(" ", "")
    rest = re.sub(r"\b(?:kappa|lambda|k|armenian|syrian)\b", " ", words.replace(found[0], " "))
    bare = all(word in _SPECIES for word in rest.split())
    of_a_kit = len(kind) > 1 or (species is not None and kind == "g")  # IgG1 is a control, IgM and IgD are targets
    if control or (bare and of_a_kit and not says_anti):
        return species, f"Ig{kind[0].upper()}{kind[1:]}", None
    return None


def _target(text: str, clone: str | None) -> tuple[str | None, str, str | None]:
    """Target of a name, the name without a clone, and the clone."""
    other = _FIRST.fullmatch(text) or _LAST.fullmatch(text)
    if other:  # not the human protein
        target, rest, clone = _target(other["rest"], clone)
        species = _SPECIES[other["species"].casefold()]
        return target and f"{species} {target}", f"{species} {rest}", clone
    if _known(text):
        return _known(text), text, clone
    found = _BRACKETS.fullmatch(text)
    if found:
        outside, inside = found.groups()
        target, outside, clone = _target(outside, clone)
        if _known(inside):
            return (_known(inside) if target in (None, _known(inside)) else None), text, clone
        if clone is None and _INSIDE.fullmatch(inside):
            return target, outside, inside
        return target, text if target is None else outside, clone
    for cut in re.finditer(r"[ _./\-]+", text):
        head, tail = text[: cut.start()], text[cut.end() :]
        if _known(head) and _known(tail) == _known(head):
            return _known(head), head, clone
        if _known(head) and clone is None and not _known(tail) and _TAIL.fullmatch(tail):
            return _known(head), head, tail
    return None, text, clone


def _key(text: str) -> str:
    """A text without case, spaces and hyphens, other than those between two digits."""
    text = unicodedata.normalize("NFKC", text).casefold()
    for word, letter in _GREEK.items():
        text = text.replace(word, letter)
    text = re.sub(r"[\s_.:,;/\\()\[\]\-]+", "-", text).strip("-")
    return re.sub(r"(?<!\d)-|-(?!\d)", "", text)


@cache
def _synonyms() -> dict[str, str]:
    """Target of each key in the table."""
    targets = [[name.strip() for name in entry.split(", ")] for entry in TARGETS.strip().replace("\n", ";").split(";")]
    return {_key(name): names[0] for names in targets for name in names}


def _known(text: str) -> str | None:
    return _synonyms().get(_key(text))


def tell_proteins(names: Sequence[str], matched: pd.DataFrame | None, where: str, model: tuple[str, ...]) -> None:
    """Say which of a model's proteins were found, and those under other names one by one."""
    found = [name for name in model if name in set(names)]
    if matched is not None:
        others = matched[matched["how"].isin((NORMALISED, SYNONYM))]
        if len(others):
            pairs = [f"{old} -> {new}" for old, new in zip(others["name"], others["matched_to"], strict=True)]
            logger.warning(
                f"proteins: {len(found)} of the model's {len(model)} in {where}, {len(others)} of them under "
                f"other names: {listed(pairs, 6)}"
            )
        unclear = matched[matched["how"].str.startswith(AMBIGUOUS)]
        if len(unclear):
            name, how = unclear[["name", "how"]].iloc[0]
            logger.warning(
                f"proteins: {len(unclear)} in {where} count as missing: '{name}' is {how}. Rename them to "
                "the model's names to say which is which"
            )
    if len(found) == len(model):
        return
    lacks = [name for name in model if name not in set(names)]
    line = f"{len(lacks)} of the model's {len(model)} proteins are not in {where}: not measured"
    if len(found) >= MOST_FEATURES * len(model):
        logger.info(line)
        return
    left = [name for name in names if name not in set(model)]
    logger.warning(f"{line} ({listed(lacks, 5)})" + f"; the model does not know {listed(left, 5)}" * bool(left))
