"""The HTML report: escaped, well-formed, self-contained, sound in a real browser."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess

import pytest

from inductor_moe.report import Report, Site
from inductor_moe.report_html import escape, render

HOSTILE = """<script>document.title = "owned"</script>"'&<img src=x onerror=alert(1)>\x00\u202e"""
VOID = {"meta", "br"}


def site(**fields):
    base = {
        "op": "moe_experts",
        "rewrite": "moe.experts.grouped_mm",
        "module": "model.layers.0.mlp.experts",
        "source": "transformers/integrations/moe.py:336: return grouped_mm(x, w, offs=offs)",
        "detail": "E=128 K=8 H=2048 I=768 torch.bfloat16; silu, gate chunked",
        "before": "sort, histc, index \N{MULTIPLICATION SIGN}3",
        "after": "moe_experts(x [16, 2048]) -> [16, 2048] bfloat16",
        "kernels": "moe_up_decode_kernel",
        "bytes": 9_455_104,
        "flops": 75_497_472,
    }
    return Site(**{**base, **fields})


def full_report():
    fused = [site(module=f"model.layers.{layer}.mlp.experts") for layer in range(48)]
    left = site(
        rewrite="moe.experts.batched_mm",
        module="model.layers.48.mlp.experts",
        reason="the product of the second expert GEMM has another user (aten.add.Tensor), which "
        "the fused op would not feed",
    )
    return Report(
        sites=(*fused, left),
        notes=("the graph came from Inductor's cache",),
        breaks=("data-dependent branch at model.py:10 " + "x" * 150,),
        graphs=2,
        cached=True,
    )


class Checker(html.parser.HTMLParser):
    """Tags must nest; collects tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE_REPORT = Report(
    sites=tuple(
        Site(HOSTILE, HOSTILE, HOSTILE + str(number), HOSTILE, HOSTILE, reason, *[HOSTILE] * 3)
        for reason in (None, HOSTILE)
        for number in range(5)
    ),
    notes=(HOSTILE,),
    breaks=(HOSTILE,),
)


@pytest.mark.parametrize(
    "report", [Report(), full_report(), HOSTILE_REPORT], ids=["empty", "full", "hostile"]
)
def test_page_is_well_formed_and_self_contained(report):
    page = Checker(render(report))
    assert {"script", "img", "link", "iframe"}.isdisjoint(page.tags)
    assert not {"src", "href", "style", "onerror"} & {name for name, _ in page.attributes}
    assert "url(" not in render(report) and "@import" not in render(report)


def test_text_of_the_model_is_escaped():
    page = render(HOSTILE_REPORT)
    assert "<script" not in page and "<img" not in page
    assert "\x00" not in page and "\u202e" not in page
    shown = Checker(page).text
    assert shown.count('<script>document.title = "owned"</script>') >= 10
    page.encode("utf-8")


def test_lone_surrogates_can_be_written():
    assert escape("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"


def test_every_site_note_and_break_is_shown():
    report = full_report()
    shown = Checker(render(report)).text
    for each in report.sites:
        where, code = each.source.split(": ", 1)
        for text in (each.module, where, code, each.detail, each.after, each.kernels):
            assert text in shown
    assert report.refused[0].reason in shown
    assert report.refused[0].advice in shown
    assert "5 calls" in shown
    assert "9.46 MB to move, 75.5 MFLOP, 7.98 FLOP a byte" in shown
    assert report.notes[0] in shown and report.breaks[0] in shown


def test_alike_sites_share_a_card():
    assert Checker(render(full_report())).tags.count("article") == 2


def test_a_breaks_advice_stands_below_it():
    report = Report(breaks=("call to aten.nonzero.default", "second break"))
    shown = Checker(render(report)).text
    assert 'set_experts_implementation("grouped_mm")' in shown
    assert shown.index("aten.nonzero") < shown.index("set_experts") < shown.index("second break")


def test_empty_report_says_so():
    assert "No sites" in Checker(render(Report())).text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  document.body.dataset.overflow = root.scrollWidth - root.clientWidth;
  document.body.dataset.owned = document.title === "owned";
  document.body.dataset.page = getComputedStyle(document.body).backgroundColor;
})</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("report", [full_report(), HOSTILE_REPORT], ids=["full", "hostile"])
def test_page_in_a_browser(report, dark, width, tmp_path):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(report))
    # A headless window cannot be narrower than 500 pixels; a frame can.
    inner = tmp_path / "page.html"
    inner.write_text(page.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    outer = tmp_path / "frame.html"
    outer.write_text(
        f'<body style="margin:0"><iframe src="page.html" width="{width}" height="800"></iframe>'
        "<script>addEventListener('load', () => setTimeout(() => { const f = frames[0].document;"
        "document.body.dataset.found = JSON.stringify(f.body.dataset) }, 200))</script>"
    )
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [CHROMIUM, *FLAGS, *scheme, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=2000", "--dump-dom"]
    shown = subprocess.run(
        [*command, outer.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "&quot;overflow&quot;:&quot;0&quot;" in shown, shown[-2000:]
    assert "&quot;owned&quot;:&quot;false&quot;" in shown
    background = "rgb(15, 19, 23)" if dark else "rgb(246, 247, 249)"
    assert background in shown
