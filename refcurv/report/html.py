"""Pages of HTML: no script, no request, readable offline.

A page forbids itself any request by its Content-Security-Policy; its plots are SVG inside it. Every
text is escaped, wherever it comes from.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape

from refcurv.report.table import Table

STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#5d6670;--line:#d9dde2;--page:#fbfbfa;
--card:#fff;--mark:#0072b2;--hot:#c04f00}
@media(prefers-color-scheme:dark){:root{--ink:#e7e9ec;--soft:#a2abb5;--line:#373d45;
--page:#15181c;--card:#1d2126;--mark:#6db9ea;--hot:#f09a5b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header,footer{max-width:60rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}footer{padding-bottom:3rem;color:var(--soft);font-size:.875rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 1rem;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.25rem;margin:2.75rem 0 .6rem}
p{margin:.6rem 0;max-width:46rem}
.warning{border-left:.25rem solid var(--hot);padding-left:.8rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.9rem;
margin:1.75rem 0 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.8rem 1rem;min-width:0}
.tiles dt{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.tiles dd{margin:0;font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums}
.tiles .hot dd{color:var(--hot)}
.tiles dd small{display:block;font-size:.85rem;font-weight:400;color:var(--soft)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.5rem;margin:.6rem 0}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere;min-width:0}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.6rem;background:var(--card);
margin:.8rem 0 1.4rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.7rem .9rem;font-weight:600}
caption span{position:sticky;left:.9rem;display:inline-block;max-width:calc(100vw - 4.6rem)}
th,td{padding:.35rem .9rem;text-align:left;font-weight:400;white-space:nowrap;
vertical-align:baseline;
border-top:1px solid var(--line)}
thead th{color:var(--soft);font-size:.82rem}
tbody th{min-width:7rem;max-width:22rem;white-space:normal;overflow-wrap:anywhere}
tbody th.name{white-space:nowrap}
tr.more>*{border-top:0}
td:last-child:not(.r){white-space:normal;overflow-wrap:break-word}
.r{text-align:right}
td.long{white-space:normal;min-width:20rem;overflow-wrap:anywhere}
figure{margin:1.2rem 0 2rem}
figure .scroll{background:#fff;margin:0}
figure img{display:block;width:100%;min-width:38rem;height:auto;padding:.9rem}
figcaption{color:var(--soft);font-size:.9rem;margin-top:.6rem;max-width:46rem}
figcaption b{color:var(--ink)}
pre,code{font:.86rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.9rem 1rem;
overflow-x:auto;margin:.8rem 0;white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:1rem 0}summary{cursor:pointer;color:var(--mark)}
@media(max-width:34rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}}
@media print{figure,table{break-inside:avoid}}
"""


def document(title: str, head: Iterable[str], body: Iterable[str], foot: str) -> str:
    """A whole page; title, head, body and foot are HTML already."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>",
            *head,
            "</header>\n<main>",
            *body,
            f"</main>\n<footer><p>{foot}</p></footer>\n</body>\n</html>\n",
        ]
    )


def section(title: str, *parts: str) -> str:
    """A heading, and what stands under it; empty parts are left out."""
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *filter(None, parts), "</section>"])


def facts(pairs: Mapping[str, str]) -> str:
    """Names beside their values."""
    rows = [f"<dt>{escape(k)}</dt><dd>{prose(v)}</dd>" for k, v in pairs.items()]
    return '<dl class="facts">\n' + "\n".join(rows) + "\n</dl>" if rows else ""


def prose(text: str) -> str:
    """Escaped, and what stands between two backticks as code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text))


NAME = 28
"""A name of so many characters heads its row on one line."""
SENTENCE = 40
"""A cell of more characters is wrapped."""
LONG = ' class="long"'


def html_table(table: Table) -> str:
    """A table of finished cells; the first column heads its row. Empty without rows."""
    if not table.rows:
        return ""
    sides = [' class="r"' if side == "r" else "" for side in table.align]
    heads = zip(table.headers, sides, strict=True)
    lines = [f"<caption><span>{escape(table.title)}</span></caption>", "<thead><tr>"]
    lines += [f'<th scope="col"{side}>{escape(head)}</th>' for head, side in heads]
    lines.append("</tr></thead>\n<tbody>")
    for row in table.rows:
        name = ' class="name"' if len(row[0]) <= NAME else ""
        first = f'<th scope="row"{name}>{escape(row[0])}</th>' if row[0] else "<td></td>"
        cells = zip(row[1:], sides[1:], strict=True)
        body = "".join(
            f"<td{LONG if len(cell) > SENTENCE else side}>{minus(cell)}</td>"
            for cell, side in cells
        )
        kind = "" if row[0] else ' class="more"'
        lines.append(f"<tr{kind}>{first}{body}</tr>")
    lines.append("</tbody>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def minus(text: str) -> str:
    """Escaped, with a true minus sign before digits and no line break before a unit."""
    signed = text.startswith("-") and text[1:2].isdigit()
    return prose("−" + text[1:] if signed else text).replace(" %", "\u00a0%")


def figure(svg: bytes, alt: str, see: str, read: str) -> str:
    """A plot and its caption: what it shows, and how to read it."""
    data = base64.b64encode(svg).decode("ascii")
    return (
        f'<figure>\n<div class="scroll"><img alt="{escape(alt)}" '
        f'src="data:image/svg+xml;base64,{data}"></div>\n'
        f"<figcaption><b>{escape(see)}</b> {escape(read)}</figcaption>\n</figure>"
    )
