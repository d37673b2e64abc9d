// Charts as SVG: the histogram of areas, and growth curves whose geometry comes from the service.

import {median} from "./images.js";

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children. */
function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  element.append(...children);
  return element;
}

const BINS = 24, WIDTH = 300, HEIGHT = 106, LEFT = 30, BOTTOM = 88;

/** Histogram of ascending values (areas in pixels); the last bin contains everything above the 98th percentile. */
export function histogram(values) {
  const chart = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "chart"});
  if (!values.length) return chart;
  const last = values.length - 1;
  const step = nice(Math.max(values[Math.floor(0.98 * last)], 1) / BINS);
  const counts = new Array(Math.max(Math.ceil(values[Math.floor(0.98 * last)] / step), 1) + 1).fill(0);
  values.forEach((value) => counts[Math.min(Math.floor(value / step), counts.length - 1)]++);
  const highest = Math.max(...counts), width = (WIDTH - LEFT - 6) / counts.length;
  chart.setAttribute("aria-label", `Areas of ${values.length} cells: median ${median(values)} pixels, ` +
    `from ${values[0]} to ${values[last]}`);
  counts.forEach((count, i) => {
    const height = (count / highest) * (BOTTOM - 8);
    const range = i === counts.length - 1 ? `${i * step} pixels or more` : `${i * step} to ${(i + 1) * step} pixels`;
    chart.append(svg("rect", {x: LEFT + i * width + 0.5, y: BOTTOM - height, width: Math.max(width - 1, 0.5), height, class: "bar"},
      svg("title", {}, `${count} cells of ${range}`)));
  });
  chart.append(svg("path", {class: "rule", d: `M${LEFT} ${BOTTOM}H${WIDTH - 6}`}),
    svg("text", {x: LEFT - 5, y: 14, class: "end"}, String(highest)),
    svg("text", {x: LEFT - 5, y: BOTTOM + 3, class: "end"}, "0"));
  for (let i = 0; i < counts.length; i += Math.ceil(counts.length / 4)) {
    chart.append(svg("text", {x: LEFT + i * width, y: BOTTOM + 14, class: "middle"}, String(i * step)));
  }
  return chart;
}

/** Round up to 1, 2 or 5 times a power of ten, at least 1. */
function nice(step) {
  const power = 10 ** Math.floor(Math.log10(Math.max(step, 1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= step);
}

/** A growth chart: geometry as reports/growth_charts.py describes it. */
export function growthChart(chart) {
  const {box} = chart;
  const element = svg("svg", {viewBox: `0 0 ${box.width} ${box.height}`, role: "img", class: "chart", "aria-label": `${chart.title}, over hours`});
  for (const [at, label] of chart.y_ticks) {
    element.append(svg("path", {class: "rule", d: `M${box.left} ${at}H${box.right}`}),
      svg("text", {class: "end", x: box.left - 6, y: at + 4}, label));
  }
  for (const [at, label] of chart.x_ticks) {
    element.append(svg("path", {class: "rule", d: `M${at} ${box.top}V${box.bottom}`}),
      svg("text", {class: "middle", x: at, y: box.bottom + 15}, label));
  }
  element.append(svg("text", {class: "middle", x: (box.left + box.right) / 2, y: box.height - 5}, "hours"));
  const paths = [["band", chart.band], ...chart.wells.map((well) => ["well", well]), ["mean", chart.line],
    [chart.trusted ? "fit good" : "fit bad", chart.fit]];
  paths.filter(([, d]) => d).forEach(([name, d]) => element.append(svg("path", {class: name, d})));
  chart.points.forEach((point) => element.append(
    svg("circle", {class: "dot", cx: point.x, cy: point.y, r: 2.6}, svg("title", {}, point.title))));
  return element;
}
