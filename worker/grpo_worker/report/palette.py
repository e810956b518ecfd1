"""The colours of the charts, for a light and for a dark page.

Invariant: slot i means the same line in both, and a part of the step time keeps its slot from chart to chart.
"""

LIGHT = ("#2563eb", "#d9730d", "#12906b", "#8b4fd9", "#c2374a", "#0e8fa3", "#a67c00", "#c4478f", "#6d5a4a", "#9aa3ae")
DARK = ("#6ea0ff", "#f0a04b", "#3fc296", "#b48cf2", "#f07183", "#3fc0d4", "#d9b53a", "#ee84bf", "#b39b88", "#737d89")
