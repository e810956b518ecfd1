"""The report's style sheet.

Invariant: no font, image or rule comes from outside; light and dark follow the reader's system, and print is light.
"""

# The charts' colours on a light and on a dark page: slot i means the same line in both, and a part of the step time keeps its slot.
LIGHT = ("#2563eb", "#d9730d", "#12906b", "#8b4fd9", "#c2374a", "#0e8fa3", "#a67c00", "#c4478f", "#6d5a4a", "#9aa3ae")
DARK = ("#6ea0ff", "#f0a04b", "#3fc296", "#b48cf2", "#f07183", "#3fc0d4", "#d9b53a", "#ee84bf", "#b39b88", "#737d89")


def style_sheet() -> str:
    """The whole CSS, with the palette's classes c0, c1, ..."""
    light = "".join(f"--c{i}:{color};" for i, color in enumerate(LIGHT))
    dark = "".join(f"--c{i}:{color};" for i, color in enumerate(DARK))
    classes = "".join(
        f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i},.bar.c{i}{{fill:var(--c{i})}}.key.c{i}{{background:var(--c{i})}}"
        for i in range(len(LIGHT))
    )
    return (
        f":root{{color-scheme:light dark;{_LIGHT}{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}" + _RULES + classes
    )


_LIGHT = (
    "--page:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#5d6673;--line:#e2e6eb;--grid:#eceff3;"
    "--good:#0b7a52;--bad:#b3261e;--warn:#8a5a00;--goodbg:#e3f5ec;--badbg:#fbe9e7;--warnbg:#fdf3dc;"
)
_DARK = (
    "--page:#0f1216;--card:#171b21;--ink:#e7eaee;--soft:#97a1ae;--line:#2a313a;--grid:#232931;"
    "--good:#5fd3a1;--bad:#ff8a80;--warn:#f0c060;--goodbg:#12332a;--badbg:#3b1d1c;--warnbg:#3a2f14;"
)
_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:36px 24px 64px}
h1{font-size:17px;font-weight:600;margin:0;color:var(--soft)}
h2{font-size:19px;margin:44px 0 14px}
.hero{display:flex;align-items:baseline;flex-wrap:wrap;gap:4px 18px;margin:6px 0 22px}
.hero .big{font-size:44px;font-weight:700;letter-spacing:-.02em;font-variant-numeric:tabular-nums;line-height:1.15}
.hero .measure{font-size:20px;color:var(--soft)}
.pill{border-radius:99px;padding:1px 10px;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.up{color:var(--good);background:var(--goodbg)}.down{color:var(--bad);background:var(--badbg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}
.tile,.card,.panel{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:11px 15px;min-width:0}
.tile .label,.note,.remark{color:var(--soft);font-size:13px}
.tile .value{font-size:20px;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere;line-height:1.3}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(350px,100%),1fr));gap:14px}
.card{padding:13px 15px 9px;display:flex;flex-direction:column;min-width:0}
.card.wide{grid-column:span 2}
@media(max-width:800px){.card.wide{grid-column:auto}}
.card header{display:flex;justify-content:space-between;align-items:baseline;gap:10px}
.card h3{font-size:15px;margin:0}
.card .ends{font-size:14px;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}
.card .ends b{color:var(--ink)}
.card .note{margin:0 0 6px;flex:1}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid);stroke-width:1}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.32}
.dot{stroke:var(--card);stroke-width:1}
.tip{fill:transparent;pointer-events:all}.tip:hover{fill:var(--soft);fill-opacity:.25}.bar:hover{opacity:.75}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--soft);margin:4px 0 2px}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.panel{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:600;font-size:13px;white-space:nowrap}
th,td{padding:9px 13px;vertical-align:top;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}
.text{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.samples table{table-layout:fixed;min-width:720px}
.samples th:nth-child(1){width:27%}.samples th:nth-child(2){width:13%}
.score{margin-bottom:5px;font-size:13px;font-family:system-ui,sans-serif}
.warning{color:var(--warn);background:var(--warnbg)}.error{color:var(--bad);background:var(--badbg)}
.info{color:var(--soft);background:var(--grid)}
.time{white-space:nowrap;font-variant-numeric:tabular-nums;color:var(--soft)}
details>summary{cursor:pointer;padding:10px 15px;font-weight:600}
td details>summary{padding:0;font-weight:400;color:var(--soft)}
pre{margin:0;padding:4px 15px 14px;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-x:auto}
.problems{border-left:3px solid var(--warn);padding:2px 14px;margin:18px 0 0;color:var(--soft);font-size:14px}
footer{margin-top:40px;color:var(--soft);font-size:13px}
"""
