"""The report as one HTML file that holds all it shows: pictures, findings, charts, recipe; no network.

Owns the page. Its template, style and script are files beside this one; the rest of the package fills them.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template

from mergekit_sd.sampling.groups import groups
from mergekit_sd.sampling.html.about import about, models
from mergekit_sd.sampling.html.charts import charts
from mergekit_sd.sampling.html.findings import findings, summary
from mergekit_sd.sampling.html.pictures import chosen, pictures
from mergekit_sd.sampling.html.words import escaped
from mergekit_sd.sampling.values import SamplingReport
from mergekit_sd.version import VERSION


def as_html(report: SamplingReport) -> str:
    """The whole page. The same report gives the same page."""
    found = groups(report)
    style, script = _part("style.css"), _part("script.js")
    pair = chosen(report, found)
    return Template(_part("page.html")).substitute(
        version=VERSION,
        title=escaped(report.title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        summary=summary(report),
        models=models(report),
        pictures=pictures(report, found),
        compare=Template(_part("compare.html")).substitute(left=escaped(pair[0]), right=escaped(pair[1]))
        if pair
        else "",
        findings=findings(report),
        charts=charts(report),
        about=about(report, found),
    )


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As the page's policy names a script or style that may run; no other may."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
