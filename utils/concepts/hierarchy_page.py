"""Style and script of the interactive picture of a hierarchy; neither depends on what is shown.

The script reads everything from attributes, writes only text (never markup), asks for nothing over the network, and
works on every picture of the page that it has not seen.
"""

STYLE = """
.seedbed-hierarchy{--ink:#1c2024;--soft:#5b6570;--line:#8a949e;--paper:#fff;--card:#f6f8fa;--edge:#d8dde3;
--above:#b45309;--below:#1d64b8;--c0:#7fa3c8;--c1:#e0a37f;--c2:#85bd99;--c3:#b49bd2;--c4:#cdb36a;--c5:#d593b2;
--c6:#7fbcc1;--c7:#a6adb5;color:var(--ink);background:var(--paper);font:13px/1.45 system-ui,sans-serif;padding:12px;
box-sizing:border-box;max-width:100%;overflow-wrap:anywhere}
@media (prefers-color-scheme:dark){.seedbed-hierarchy{--ink:#e6e9ec;--soft:#9aa5b1;--line:#75808b;--paper:#16191d;
--card:#1f242a;--edge:#3a424b;--above:#f5a65b;--below:#7db7ff;--c0:#3f6a98;--c1:#a8623a;--c2:#3f7f57;--c3:#73569a;
--c4:#8a7028;--c5:#954f70;--c6:#397b80;--c7:#59616a}}
.seedbed-hierarchy .scroll{overflow:auto;max-height:720px}
.seedbed-hierarchy svg{display:block;max-width:none}
.seedbed-hierarchy .legend{color:var(--soft);font-size:12px;margin:0 0 8px}
.seedbed-hierarchy .legend span{margin-right:16px;white-space:nowrap}
.seedbed-hierarchy .legend svg,.seedbed-hierarchy .legend i{display:inline-block;vertical-align:-2px;margin-right:5px}
.seedbed-hierarchy .legend i{width:12px;height:12px;border-radius:3px}
.seedbed-hierarchy rect{stroke:var(--edge);stroke-width:1}
.seedbed-hierarchy text{fill:var(--ink);font:12px system-ui,sans-serif;text-anchor:middle;dominant-baseline:central;
pointer-events:none}
.seedbed-hierarchy path.line{fill:none;stroke:var(--line);stroke-width:1.4}
.seedbed-hierarchy path.is{stroke-dasharray:5 4}
.seedbed-hierarchy path.head{fill:var(--line);stroke:none}
.seedbed-hierarchy g[data-node]{cursor:pointer;outline:none}
.seedbed-hierarchy g[data-node]:hover rect,.seedbed-hierarchy g[data-node]:focus-visible rect{stroke:var(--ink);
stroke-width:2}
.seedbed-hierarchy .off{opacity:.22}
.seedbed-hierarchy g.chosen rect{stroke:var(--ink);stroke-width:3}
.seedbed-hierarchy g.above rect{stroke:var(--above);stroke-width:2.5}
.seedbed-hierarchy g.below rect{stroke:var(--below);stroke-width:2.5}
.seedbed-hierarchy path.line.above{stroke:var(--above);stroke-width:2.2}
.seedbed-hierarchy path.line.below{stroke:var(--below);stroke-width:2.2}
.seedbed-hierarchy path.head.above{fill:var(--above)}.seedbed-hierarchy path.head.below{fill:var(--below)}
.seedbed-hierarchy .card{background:var(--card);border-radius:6px;padding:8px 12px;margin-top:8px;min-height:3.2em;
white-space:pre-line}
.seedbed-hierarchy .card b{font-weight:600}
""" + "".join(
    f".seedbed-hierarchy rect.c{i}{{fill:var(--c{i})}}.seedbed-hierarchy i.c{i}{{background:var(--c{i})}}"
    for i in range(8)
)
SCRIPT = """
document.querySelectorAll('.seedbed-hierarchy[data-graph]:not([data-ready])').forEach(function (root) {
  root.setAttribute('data-ready', '');
  var graph = JSON.parse(root.getAttribute('data-graph')), card = root.querySelector('.card');
  var hint = card.textContent, chosen = null;
  var nodes = Array.from(root.querySelectorAll('g[data-node]'));
  var lines = Array.from(root.querySelectorAll('[data-line]'));
  function reach(start, from, to) {
    var found = new Set(), waiting = [start];
    while (waiting.length) {
      var node = waiting.pop();
      graph.lines.forEach(function (line) {
        if (line[from] === node && !found.has(line[to])) { found.add(line[to]); waiting.push(line[to]); }
      });
    }
    return found;
  }
  function tell(number) {
    card.textContent = '';
    if (number === null) { card.textContent = hint; return; }
    var name = document.createElement('b');
    name.textContent = graph.names[number];
    card.append(name, '\\n' + graph.said[number]);
  }
  function mark(number) {
    chosen = number;
    var above = number === null ? new Set() : reach(number, 1, 0);
    var below = number === null ? new Set() : reach(number, 0, 1);
    nodes.forEach(function (node) {
      var own = +node.getAttribute('data-node');
      node.classList.toggle('chosen', own === number);
      node.setAttribute('aria-pressed', own === number);
      node.classList.toggle('above', above.has(own));
      node.classList.toggle('below', below.has(own));
      node.classList.toggle('off', number !== null && own !== number && !above.has(own) && !below.has(own));
    });
    lines.forEach(function (line) {
      var ends = graph.lines[+line.getAttribute('data-line')];
      var up = above.has(ends[0]) && (above.has(ends[1]) || ends[1] === number);
      var down = below.has(ends[1]) && (below.has(ends[0]) || ends[0] === number);
      line.classList.toggle('above', up);
      line.classList.toggle('below', down);
      line.classList.toggle('off', number !== null && !up && !down);
    });
    tell(number);
  }
  nodes.forEach(function (node) {
    var own = +node.getAttribute('data-node');
    node.addEventListener('mouseenter', function () { tell(own); });
    node.addEventListener('focus', function () { tell(own); });
    node.addEventListener('mouseleave', function () { tell(chosen); });
    node.addEventListener('click', function (event) { event.stopPropagation(); mark(chosen === own ? null : own); });
    node.addEventListener('keydown', function (event) {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); mark(chosen === own ? null : own); }
    });
  });
  root.querySelector('.scroll').addEventListener('click', function () { mark(null); });
  root.addEventListener('keydown', function (event) { if (event.key === 'Escape') { mark(null); } });
});
"""
