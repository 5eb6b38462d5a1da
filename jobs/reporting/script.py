"""The report's script: run switching, table sorting, theme, chart read-outs. Plain JavaScript, nothing loaded."""

SCRIPT = """
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Theme: the system's unless chosen. Storage is closed to pages on some disks; then the choice lasts for the visit.
const theme = document.querySelector(".theme");
const themes = ["auto", "light", "dark"];
function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.dataset.name = name;
  theme.textContent = {auto: "◐ Auto", light: "○ Light", dark: "● Dark"}[name];
  try { localStorage.setItem("hardviews-theme", name); } catch (error) { /* no storage for this page */ }
}
let stored = null;
try { stored = localStorage.getItem("hardviews-theme"); } catch (error) { /* no storage for this page */ }
setTheme(themes.includes(stored) ? stored : "auto");
theme.addEventListener("click", () => setTheme(themes[(themes.indexOf(theme.dataset.name) + 1) % 3]));

// Run switching: tabs by click, arrow keys, Home and End.
const tabs = all("[role=tab]");
function showRun(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) { tab.focus(); window.scrollTo(0, 0); }
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => showRun(tab, true));
  tab.addEventListener("keydown", event => {
    const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    showRun(tabs[(to + tabs.length) % tabs.length], true);
  });
});
function showTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const panel = target && target.closest("[role=tabpanel]");
  if (panel && panel.hidden) {
    showRun(tabs.find(tab => tab.getAttribute("aria-controls") === panel.id), false);
    target.scrollIntoView();
  }
}
window.addEventListener("hashchange", showTarget);
showTarget();

// Tables: a click on a header sorts by it, a second one turns the order round; empty cells stay last.
for (const table of all("table.sortable")) {
  const heads = all("thead th", table), body = table.tBodies[0];
  const collator = new Intl.Collator(undefined, {numeric: true});
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
    };
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  }));
}

// Charts: pointer or arrow keys move a read-out over the nearest value of each line.
for (const plot of all(".plot[data-lines]")) {
  const {lines, x_label: label} = JSON.parse(plot.dataset.lines);
  const places = [...new Set(lines.flatMap(line => line.at))].sort((a, b) => a - b);
  const layer = plot.appendChild(document.createElement("div"));
  const live = plot.parentElement.querySelector(".live");
  let here = places.length - 1;
  function element(name, parent, text) {
    const made = parent.appendChild(document.createElement(name));
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function show(index, speak) {
    here = Math.max(0, Math.min(places.length - 1, index));
    const at = places[here];
    layer.replaceChildren();
    const cross = element("span", layer);
    cross.className = "cross";
    cross.style.left = 100 * at + "%";
    const tip = document.createElement("div");
    tip.className = "tip";
    const words = [];
    for (const line of lines) {
      let near = 0;
      line.at.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(line.at[near] - at)) near = i; });
      if (!words.length) { words.push(label + " " + line.x[near]); element("strong", tip, words[0]); }
      const dot = element("span", layer);
      dot.className = "mark-dot";
      dot.style.left = 100 * line.at[near] + "%";
      dot.style.bottom = 100 * line.height[near] + "%";
      dot.style.setProperty("--c", `var(--s${line.colour})`);
      const row = element("div", tip);
      element("i", row).style.setProperty("--c", `var(--s${line.colour})`);
      element("span", row, line.name);
      element("b", row, line.y[near]);
      words.push(line.name + " " + line.y[near]);
    }
    layer.append(tip);
    tip.style[at > 0.5 ? "right" : "left"] = `calc(${100 * (at > 0.5 ? 1 - at : at)}% + 12px)`;
    if (speak) live.textContent = words.join(", ");
  }
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    let near = 0;
    places.forEach((x, i) => { if (Math.abs(x - at) < Math.abs(places[near] - at)) near = i; });
    show(near, false);
  });
  plot.addEventListener("pointerleave", () => layer.replaceChildren());
  plot.addEventListener("blur", () => layer.replaceChildren());
  plot.addEventListener("keydown", event => {
    const to = {ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: places.length - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to, true);
  });
}

// Section list: marks the section in view.
if ("IntersectionObserver" in window) {
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      const link = document.querySelector(`.contents a[href="#${entry.target.id}"]`);
      all(".contents a[aria-current]").forEach(other => other.removeAttribute("aria-current"));
      if (link) link.setAttribute("aria-current", "true");
    }
  }, {rootMargin: "-20% 0px -70% 0px"});
  all("section[id]").forEach(section => seen.observe(section));
}
"""
