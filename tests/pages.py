"""A study's folder made by hand, its first page, and a strict reader of HTML."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from ensdistill.metrics import METRICS
from ensdistill.page import first_page
from ensdistill.studies import Study
from tests.builders import encode, noise
from tests.project import METHODS, TINY

SYSTEMS = ["DE-1", "DE-2", "DE-3", "BE", "KD-single", "KD", "KD+ConfODS"]
NEAR = "How near do students come to the ensemble?"
TITLES = {"cost_quality": "Quality and cost", "sweep": "Diversity by size", "de_curve": "Curve"}
VOID = {"meta", "link", "img", "input", "br", "hr"}


def results(systems=SYSTEMS):
    """A results table with costs; the last system has no diversity."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"system": systems, "n": [3, 3, 1, 2, 2, 2, 2][: len(systems)]})
    for key in METRICS:
        frame[key] = rng.uniform(0.1, 0.9, len(systems))
        frame[f"{key}_std"] = rng.uniform(0.001, 0.01, len(systems))
    frame.loc[2, [column for column in frame if column.endswith("_std")]] = 0.0
    frame.loc[len(systems) - 1, ["diversity", "diversity_std"]] = np.nan
    frame["dee_outside"] = frame["dee_ts_outside"] = 0
    frame["parameters"] = [1000, 2000, 3000, 1100, 1000, 1100, 1100]
    frame["passes"] = [1, 2, 3, 2, 1, 2, 2]
    frame["macs"] = [1e6, 2e6, 12e6, 2.1e6, 1e6, 2.1e6, 2.1e6]
    frame["ms_1"] = [0.5, 1.0, 1.5, 1.2, 0.5, 1.2, 1.1]
    frame["ms_128"] = [0.05, 0.1, 0.15, 0.12, 0.05, 0.12, 0.11]
    return frame


def finding(question, system, estimate, low, high, verdict, **others):
    """A row of findings.csv."""
    row = {"question": question, "quantity": "share of the gain", "system": system}
    row |= {"estimate": estimate, "low": low, "high": high, "p": 0.01, "verdict": verdict}
    row["asked"] = "> 0.5"
    return {**row, "n": 100, "seeds": 2, **others}


def findings():
    """Two questions: how near students come, and one with all three verdicts."""
    rows = [
        finding(NEAR, "KD-single", 0.416, 0.2, 0.634, "yes"),
        finding(NEAR, "KD+ConfODS", 0.92, 0.85, 0.97, "yes"),
        finding(NEAR, "BE", 0.1, 0.05, 0.3, "yes"),
    ]
    for system, verdict in zip(SYSTEMS[3:], ["yes", "no", "undecided", "no"], strict=True):
        rows.append(finding("Is mixup enough?", system, 0.1, -0.1, 0.3, verdict, p=0.00001))
    return pd.DataFrame(rows)


def claims():
    """Two claims, three rows."""
    known = {"estimate": 0.5, "low": 0.25, "high": 0.75, "n": 100, "seeds": 0, "claimed": "> 0"}
    verdicts = [("A", "supported"), ("A", "undecided"), ("B", "not supported")]
    rows = [{"claim": c, "quantity": f"of {c}", "verdict": v, **known} for c, v in verdicts]
    return pd.DataFrame(rows)


def study(**changes):
    """A configuration as the rule has it."""
    known = Study.model_validate({**TINY, **changes})
    dumped = known.model_dump(exclude={"methods", "grid", "published"})
    return dumped | {"methods": {name: method["label"] for name, method in METHODS.items()}}


def write_header(path, **header):
    """A weights file without weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"__metadata__": {"ensdistill": json.dumps(header)}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def make_folder(folder, **tables):
    """results/<study> with three figures and tables, those given in place of the usual ones."""
    usual = {"tables/results.csv": results, "findings.csv": findings, "claims.csv": claims}
    for name, table in usual.items():
        frame = tables.get(name.split("/")[-1].removesuffix(".csv"), table)
        frame = frame() if callable(frame) else frame
        if frame is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            frame.to_csv(folder / name, index=False)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name in TITLES:
        picture = encode(noise(20, 30, 3, seed=len(name)))
        (folder / "figures" / f"{name}.png").write_bytes(picture)
    captions = folder / "report"
    captions.mkdir(exist_ok=True)
    for name in TITLES:
        text = f"What *{name}* shows of {{{{ snakemake.wildcards.study }}}}, n = 3. It is noise.\n"
        (captions / f"{name}.rst").write_text(text)
    return folder


def page_of(folder, name="tiny", **changes):
    """The first page of a folder, parsed."""
    return Page(first_page(folder, name, study(**changes), TITLES, folder / "report"))


class Page(HTMLParser):
    """HTML, which must be well-formed, as a tree."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.builder = html, [], ElementTree.TreeBuilder()
        self.feed(html)
        self.close()
        assert not self.open
        self.tree = self.builder.close()

    def handle_decl(self, decl):
        assert decl == "doctype html"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.builder.start(tag, {key: value or "" for key, value in attrs})
        if tag in VOID:
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)

    def all(self, tag="*", **attributes):
        """Elements of a kind with these attributes."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        found = self.tree.iter(None if tag == "*" else tag)
        return [it for it in found if wanted.items() <= it.attrib.items()]

    def text(self, element):
        return " ".join("".join(element.itertext()).split())

    def section(self, name):
        (found,) = self.all("section", id=name)
        return found

    def table(self):
        """Cells by system and column of the results table: texts, and values to sort by."""
        (table,) = self.all("table", id="table")
        keys = [button.get("data-key") for button in table.iter("button")]
        rows = {}
        for body in table.iter("tbody"):
            cells = list(body.find("tr"))
            rows[self.text(cells[0])] = dict(zip(keys, cells, strict=True))
        return rows
