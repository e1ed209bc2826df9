"""The frame of `report.html`: one self-contained page, light and dark, for screen and paper."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from parallel_train import drawing


def escape(value: Any) -> str:
    """Escaped for HTML, without what no page may hold: control characters, and bytes that are no text.

    (Python reads such bytes, in a file name say, as surrogates.)
    """
    return html.escape(re.sub(r'[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]', '\ufffd', str(value)))


def page_of(title: str, body: str) -> str:
    def variables(colors: Mapping[str, str]) -> str:
        return ''.join(f'--{role}:{color};' for role, color in colors.items())

    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        '<meta name="color-scheme" content="light dark" />'
        f'<title>{escape(title)}</title><style>\n'
        f':root{{{variables(drawing.LIGHT)}--page:#fdfdfc;--soft:#f3f4f5}}\n'
        f'@media screen and (prefers-color-scheme:dark){{:root{{{variables(drawing.DARK)}'
        f'--page:#16181b;--soft:#202327}}}}\n{STYLE}</style></head>\n'
        f'<body><main>{body}</main></body></html>\n'
    )


STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
  "Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums lining-nums;
  -webkit-text-size-adjust:100%}
main{max-width:1000px;margin:0 auto;padding:56px 28px 72px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;font-weight:650;margin:0 0 10px}
h2{font-size:20px;letter-spacing:-.01em;font-weight:650;margin:0 0 18px}
h3{font-size:15px;font-weight:600;margin:0 0 14px}
.lead{font-size:18px;margin:0}.lead b{font-weight:600}
.muted{color:var(--muted)}header .muted{margin:2px 0 0}
.note{font-size:14px;margin:14px 0 0}.note b{color:var(--ink);font-weight:600}
section{margin-top:52px;padding-top:22px;border-top:1px solid var(--line)}
dl,dd,figure{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
  margin-top:32px}
.tiles>div{display:flex;flex-direction:column;background:var(--soft);
  border-radius:10px;padding:16px 18px}
.tiles dd{font-size:30px;line-height:1.2;font-weight:600;letter-spacing:-.02em;
  overflow-wrap:anywhere}
.tiles dt{font-size:14px;color:var(--muted);margin-top:2px}
.warnings{margin-top:24px;border-left:4px solid var(--eval);background:var(--soft);
  border-radius:0 10px 10px 0;padding:14px 20px}
.warnings h2{font-size:15px;margin:0 0 4px}.warnings ul{margin:0;padding-left:18px}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:36px 44px;align-items:start}
.chart svg{display:block;width:100%;height:auto;overflow:visible;font-family:inherit}
.chart svg *{stroke-linejoin:round;stroke-linecap:butt}
table.rows{border-collapse:collapse;width:100%;font-size:15px}
.rows th{font-weight:500;font-size:13px;color:var(--muted)}
.rows th,.rows td{text-align:right;padding:7px 0 7px 14px;border-bottom:1px solid var(--line)}
.rows th:first-child,.rows td:first-child{text-align:left;padding-left:0}
.bar{display:flex;gap:2px;height:30px;border-radius:6px;overflow:hidden;margin-bottom:10px}
.bar i{min-width:2px}.bar i,.rows i{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.rows i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:9px}
.pairs{columns:2;column-gap:44px;font-size:14.5px}
.pairs>div{display:flex;justify-content:space-between;gap:18px;padding:5px 0;break-inside:avoid;
  border-bottom:1px solid var(--line)}
.pairs dt{color:var(--muted)}.pairs dd{text-align:right;overflow-wrap:anywhere}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:18px 14px}
.samples figure{break-inside:avoid;min-width:0}
.samples img{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;
  border-radius:6px;background:#000}
.samples .wrong img{outline:3px solid var(--bad);outline-offset:1px}
.samples figcaption{font-size:13px;line-height:1.35;margin-top:7px;overflow-wrap:anywhere}
.samples b{font-weight:550}.samples span,.samples em{display:block;font-style:normal}
.samples span{color:var(--muted)}
.samples .wrong b,.samples em{color:var(--bad)}
pre{background:var(--soft);border-radius:10px;padding:16px 18px;margin:0;white-space:pre-wrap;
  overflow-wrap:anywhere;font:13.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:720px){main{padding:32px 18px 48px}h1{font-size:27px}.pair{grid-template-columns:
  minmax(0,1fr)}.pairs{columns:1}section{margin-top:38px}
  .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles dd{font-size:21px}}
@media print{:root{--page:#fff}.samples{grid-template-columns:repeat(8,1fr)}
  .tiles dd{font-size:21px}
  main{max-width:none;padding:0}section{margin-top:26px}.pair,.chart,.rows,.warnings{
  break-inside:avoid}h2{break-after:avoid}body{font-size:13px}.tiles>div,pre,.warnings{border:1px
  solid var(--line)}}
"""
