"""The report's style sheet: light and dark by CSS variables, one column on a phone, two on a desk."""

# Series colours keep their order in every chart; the dark steps are chosen for a dark surface, not inverted.
_LIGHT = """
  color-scheme: light;
  --page: #f6f6f3; --surface: #fcfcfb; --raised: #f1f0ec; --ink: #0b0b0b; --ink-2: #52514e; --muted: #6c6a64;
  --grid: #e4e3dc; --axis: #c3c2b7; --border: rgba(11, 11, 11, 0.10); --accent: #1c5cab; --chosen: #c2410c;
  --good: #0a7d0a; --warn: #8a5a00; --bad: #c22f2f; --cell: 42, 120, 214;
  --s0: #2a78d6; --s1: #eb6834; --s2: #1baf7a; --s3: #eda100; --s4: #e87ba4; --s5: #008300; --s6: #4a3aa7;
  --s7: #e34948;
"""
_DARK = """
  color-scheme: dark;
  --page: #0d0d0d; --surface: #1a1a19; --raised: #252523; --ink: #ffffff; --ink-2: #c3c2b7; --muted: #98968f;
  --grid: #2c2c2a; --axis: #45443f; --border: rgba(255, 255, 255, 0.12); --accent: #86b6ef; --chosen: #ff8a4c;
  --good: #2fbf2f; --warn: #fab219; --bad: #ff7b7b; --cell: 57, 135, 229;
  --s0: #3987e5; --s1: #e8743f; --s2: #199e70; --s3: #c98500; --s4: #d55181; --s5: #1f9d1f; --s6: #9085e9;
  --s7: #e66767;
"""

SERIES_COLOURS = 8

STYLE = (
    ":root {"
    + _LIGHT
    + "}\n@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) {"
    + _DARK
    + "} }\n:root[data-theme=dark] {"
    + _DARK
    + "}\n"
    + """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 4.5rem; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } * { transition: none !important; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
a { color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 1rem; top: .5rem; z-index: 9; background: var(--surface); padding: .5rem 1rem; }
.hidden { position: absolute; left: 0; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
[hidden] { display: none !important; }

.top { position: sticky; top: 0; z-index: 5; background: var(--page); border-bottom: 1px solid var(--border); }
.top > div { display: flex; gap: .75rem; align-items: center; max-width: 82rem; margin: auto;
  padding: .6rem 1.25rem; }
.brand { font-weight: 650; letter-spacing: -.01em; white-space: nowrap; }
.brand span { color: var(--muted); font-weight: 400; }
[role=tablist] { display: flex; gap: .25rem; overflow-x: auto; flex: 1; padding: 3px; scrollbar-width: none; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
[role=tab], .theme { padding: .25rem .7rem; border-radius: 999px; color: var(--ink-2); white-space: nowrap;
  font-size: .9rem; }
[role=tab]:hover, .theme:hover { background: var(--raised); }
[role=tab][aria-selected=true] { background: var(--ink); color: var(--page); }
.theme { border: 1px solid var(--border); margin-left: auto; }

.panel { display: grid; grid-template-columns: 11.5rem minmax(0, 1fr); gap: 2.5rem; max-width: 82rem; margin: auto;
  padding: 1.5rem 1.25rem 4rem; }
.contents { position: sticky; top: 4.5rem; align-self: start; font-size: .9rem; }
.contents ol { list-style: none; margin: 0; padding: 0; border-left: 1px solid var(--grid); }
.contents a { display: block; padding: .22rem .9rem; color: var(--ink-2); text-decoration: none; margin-left: -1px;
  border-left: 2px solid transparent; }
.contents a:hover, .contents a[aria-current] { color: var(--ink); border-left-color: var(--accent); }
h1 { font-size: clamp(1.5rem, 1.1rem + 1.6vw, 2.1rem); line-height: 1.2; margin: .1rem 0 .35rem;
  letter-spacing: -.02em;
  text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 0 0 .35rem; }
section { padding: 2rem 0 0; }
section > p, .lead { color: var(--ink-2); max-width: 46rem; margin: 0 0 1rem; text-wrap: pretty; }
.lead { margin-bottom: 1.5rem; }
.missing { border: 1px dashed var(--axis); border-radius: 10px; padding: .8rem 1rem; color: var(--ink-2);
  max-width: none; }

.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: 0 0 1rem; }
.tile, .card { background: var(--surface); border: 1px solid var(--border); border-radius: 12px; }
.tile { padding: .8rem 1rem .9rem; margin: 0; }
.tile dt { color: var(--ink-2); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.7rem; line-height: 1.25; font-weight: 600; letter-spacing: -.02em; }
.tile dd + dd { font-size: .85rem; font-weight: 400; color: var(--muted); letter-spacing: 0; line-height: 1.4; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  align-items: start; }
.card { padding: 1rem 1.1rem; min-width: 0; margin: 0; }
.wide { grid-column: 1 / -1; }
.checks { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; }
.checks li { display: grid; grid-template-columns: 1.4rem 1fr; }
.checks b { font-weight: 600; }
.checks .mark { font-weight: 700; }
.good .mark { color: var(--good); } .warn .mark { color: var(--warn); } .bad .mark { color: var(--bad); }
.checks span { color: var(--ink-2); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; color: var(--ink-2); font-size: .85rem; padding-bottom: .4rem; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
tbody th { font-weight: 450; }
thead th { color: var(--ink-2); font-weight: 500; white-space: nowrap; vertical-align: bottom; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.sort::after { content: "↕"; color: var(--axis); padding-left: .3em; font-size: .85em; }
[aria-sort=ascending] .sort::after { content: "↑"; color: var(--accent); }
[aria-sort=descending] .sort::after { content: "↓"; color: var(--accent); }
details { margin-top: .75rem; font-size: .9rem; }
summary { cursor: pointer; color: var(--ink-2); width: fit-content; }
pre { overflow-x: auto; background: var(--raised); padding: .8rem 1rem; border-radius: 8px; font-size: .8rem;
  line-height: 1.45; }
code { font-size: .9em; background: var(--raised); padding: .1em .35em; border-radius: 4px; overflow-wrap: anywhere; }

figure { margin: 0; }
.chart figcaption { font-weight: 600; display: flex; flex-wrap: wrap; gap: .1rem .7rem; align-items: baseline; }
.chart figcaption small { font-weight: 400; color: var(--muted); font-size: .82rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; list-style: none; margin: .3rem 0 0; padding: 0;
  font-size: .82rem;
  color: var(--ink-2); }
.legend i { display: inline-block; width: 1rem; height: 0; border-top: 3px solid var(--c); vertical-align: middle;
  margin-right: .4em; border-radius: 2px; }
.legend .dashed i { border-top-style: dashed; border-radius: 0; }
.legend .dotted i { border-top-style: dotted; border-radius: 0; }
.plot { position: relative; margin: .7rem .5rem 1.9rem 3.1rem; height: 13rem; touch-action: pan-y; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; display: block; }
.plot svg * { vector-effect: non-scaling-stroke; }
.plot .grid { stroke: var(--grid); stroke-width: 1; } .plot .base { stroke: var(--axis); stroke-width: 1; }
.plot .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.plot .faint { fill: none; stroke-width: 1; opacity: .32; } .plot .area { opacity: .13; stroke: none; }
.plot .dashed { stroke-dasharray: 5 4; }
.plot .dotted { stroke-dasharray: 1.5 3; }
.plot .reference { stroke: var(--muted); stroke-width: 1.5; }
.tick { position: absolute; font-size: .75rem; color: var(--muted); font-variant-numeric: tabular-nums;
  line-height: 1;
  white-space: nowrap; }
.tick.y { right: calc(100% + .45rem); transform: translateY(50%); } .tick.x { top: calc(100% + .45rem);
  transform: translateX(-50%); }
.tick.x.last { transform: translateX(-85%); }
.axis { position: absolute; font-size: .75rem; color: var(--muted); left: 50%; top: calc(100% + 1.3rem);
  transform: translateX(-50%);
  line-height: 1; white-space: nowrap; }
.mark-dot { position: absolute; width: 8px; height: 8px; border-radius: 50%; background: var(--c);
  transform: translate(-50%, 50%);
  box-shadow: 0 0 0 2px var(--surface); pointer-events: none; }
.cross { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--axis); pointer-events: none; }
.tip { position: absolute; top: -.3rem; z-index: 3; background: var(--surface); border: 1px solid var(--border);
  border-radius: 8px;
  box-shadow: 0 4px 16px rgba(0, 0, 0, .16); padding: .4rem .6rem; font-size: .8rem; pointer-events: none;
  white-space: nowrap; }
.tip div { display: flex; gap: .5rem; justify-content: space-between; color: var(--ink-2); }
.tip i { width: .55rem; height: .55rem; border-radius: 50%; background: var(--c); align-self: center; }
.tip b { color: var(--ink); font-variant-numeric: tabular-nums; margin-left: auto; }
.tip strong { color: var(--muted); font-weight: 500; }

.bars { display: grid; grid-template-columns: max-content minmax(4rem, 1fr) max-content; gap: .4rem .7rem;
  align-items: center;
  margin: .8rem 0 0; font-size: .9rem; }
.bars > .row { display: contents; }
.bars .track { position: relative; height: 1.05rem; border-left: 1px solid var(--axis); }
.bars .fill { position: absolute; inset: 0 auto 0 0; background: var(--c, var(--s0)); border-radius: 0 4px 4px 0; }
.bars .whisker { position: absolute; top: 50%; height: 1px; background: var(--ink); opacity: .65; }
.bars .whisker::before, .bars .whisker::after { content: ""; position: absolute; top: -4px; height: 9px; width: 1px;
  background: var(--ink); }
.bars .whisker::after { right: 0; }
.bars .amount { font-variant-numeric: tabular-nums; text-align: right; color: var(--ink-2); white-space: nowrap; }
.bars .amount b { color: var(--ink); font-weight: 600; }
.bars small { color: var(--muted); margin-left: .5em; }
.stack { display: flex; gap: 2px; height: 1.5rem; margin: .8rem 0 .3rem; border-radius: 5px; overflow: hidden; }
.stack span { background: var(--c); min-width: 2px; }

.heat { width: auto; border-collapse: separate; border-spacing: 2px; font-size: .78rem; }
.heat td { border: 0; padding: 0; min-width: 2.4rem; height: 1.9rem; text-align: center; vertical-align: middle;
  border-radius: 4px;
  background: rgba(var(--cell), var(--share)); font-variant-numeric: tabular-nums; }
.heat th { border: 0; padding: 0 .5rem 0 0; color: var(--ink-2); white-space: nowrap; text-align: right;
  vertical-align: middle; }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .35rem 0; }
.heat thead td { background: none; }

img { display: block; max-width: 100%; height: auto; }
.pixels { image-rendering: pixelated; }
.view-card { display: grid; grid-template-columns: minmax(8rem, 13rem) minmax(0, 1fr) minmax(9.5rem, 14rem);
  gap: .8rem 1.2rem;
  align-items: start; }
.original { position: relative; } .original img { width: 100%; border-radius: 4px; }
.original svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.original rect { fill: none; vector-effect: non-scaling-stroke; stroke: var(--c); stroke-width: 1.75;
  stroke-dasharray: 5 4; }
.original rect.halo { stroke: rgba(0, 0, 0, .55); stroke-width: 5; stroke-dasharray: none; }
.original rect.chosen { stroke-width: 3; stroke-dasharray: none; }
.views { list-style: none; margin: 0; padding: 4px; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .8rem; }
.views img { width: 100%; border-radius: 4px; }
.views .chosen img { outline: 3px solid var(--chosen); outline-offset: 2px; }
.views p { margin: .4rem 0 0; font-size: .8rem; line-height: 1.3; color: var(--ink-2); }
.views p i { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; background: var(--c);
  margin-right: .35em;
  vertical-align: -1px; }
.badge { color: var(--chosen); font-weight: 650; }
.view-card .bars { margin: 0; font-size: .82rem; gap: .22rem .5rem; }
.view-card .bars .track { height: .7rem; }
.view-card .bars .fill { background: var(--axis); }
.view-card .bars .chosen .fill { background: var(--chosen); }
.view-card .bars .chosen > :first-child { color: var(--chosen); font-weight: 650; }
.view-card > header { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
.view-card h3 { margin: 0; } .view-card > header span { color: var(--muted); font-size: .85rem; }
.stackup { display: grid; gap: 1rem; }
.mosaic { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.6rem, 1fr)); gap: .4rem;
  list-style: none; margin: .5rem 0 0;
  padding: 0; }
.mosaic img { width: 100%; border-radius: 4px; } .mosaic p { margin: 0; font-size: .72rem; color: var(--muted);
  overflow-wrap: anywhere; }
.maps { table-layout: fixed; max-width: 44rem; }
.maps td, .maps th { border: 0; padding: .25rem .5rem .25rem 0; font-size: .82rem; }
.maps { min-width: 22rem; } .maps img { width: 100%; border-radius: 4px; }
footer { color: var(--muted); font-size: .85rem; padding: 2.5rem 0 0; }

@media (max-width: 60rem) {
  .panel { grid-template-columns: minmax(0, 1fr); gap: 0; padding-top: .75rem; }
  .contents { position: static; overflow-x: auto; margin: 0 -1.25rem .75rem; padding: 0 1.25rem; }
  .contents ol { display: flex; border: 0; gap: .3rem; padding: 3px 0; }
  .contents a { border: 1px solid var(--border); border-radius: 999px; white-space: nowrap; padding: .2rem .75rem;
  background: var(--surface); }
  .view-card { grid-template-columns: minmax(7rem, 10rem) minmax(0, 1fr); }
  .view-card > .bars { grid-column: 1 / -1; }
}
@media (max-width: 34rem) {
  .view-card { grid-template-columns: minmax(0, 1fr); }
  .original { max-width: 16rem; }
  .views { grid-template-columns: repeat(auto-fill, minmax(4.7rem, 1fr)); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; }
  .tile { padding: .65rem .75rem; } .tile dd { font-size: 1.35rem; }
  .brand span { display: none; }
  .card { padding: .85rem; } .plot { height: 11rem; }
  .tick.x.odd { display: none; }
  .bars small { display: block; }
}
@media print { .top, .contents { position: static; } .panel { display: block; } .card { break-inside: avoid; } }
"""
)
