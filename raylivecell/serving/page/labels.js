// Label images: runs, measurements, colours, and the corrections delete, merge, split and draw.
//
// A label image is {width, height, data}: Int32Array in image order, 0 is background. A correction returns a change
// {at, before, after}: indices of pixels with their labels before and after it. Cells that a person has changed get new
// labels, above all earlier ones, so that a label always means the same cell.

export const MIN_CELL = 5; // pixels: smaller pieces of a cut are not cells
export const MAX_DRAWN = 2 ** 22; // pixels in the box around a drawn cell
export const MAX_GAP = 8; // pixels of background between two cells that can be merged

/** Decode runs (label, length, label, length ...) of an image. */
export function fromRuns(width, height, runs) {
  const data = new Int32Array(width * height);
  let at = 0;
  for (let i = 0; i < runs.length; i += 2) {
    data.fill(runs[i], at, at + runs[i + 1]);
    at += runs[i + 1];
  }
  return {width, height, data};
}

/** Encode a label image as runs. */
export function toRuns(labels) {
  const runs = [];
  let start = 0;
  const {data} = labels;
  for (let i = 1; i <= data.length; i++) {
    if (i === data.length || data[i] !== data[start]) {
      runs.push(data[start], i - start);
      start = i;
    }
  }
  return runs;
}

/** Measure each cell: Map of label -> {area, x, y, left, top, right, bottom, border}; x, y is the centroid. */
export function measure(labels) {
  const cells = new Map();
  const {width, height, data} = labels;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!data[i]) continue;
      let cell = cells.get(data[i]);
      if (!cell) cells.set(data[i], (cell = {area: 0, x: 0, y: 0, left: x, top: y, right: x, bottom: y, border: false}));
      cell.area++;
      cell.x += x;
      cell.y += y;
      cell.left = Math.min(cell.left, x);
      cell.right = Math.max(cell.right, x);
      cell.bottom = y;
      cell.border ||= x === 0 || y === 0 || x === width - 1 || y === height - 1;
    }
  }
  for (const cell of cells.values()) {
    cell.x /= cell.area;
    cell.y /= cell.area;
  }
  return cells;
}

/** Colour number (0 to count - 1) of each label: cells with at most two pixels between them in a row or column differ,
 * as far as possible. */
export function colourNumbers(labels, count) {
  const {width, height, data} = labels;
  const neighbours = new Map();
  const meet = (a, b) => {
    if (!b || a === b) return;
    const [low, high] = a < b ? [a, b] : [b, a];
    if (!neighbours.has(high)) neighbours.set(high, new Set());
    neighbours.get(high).add(low);
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const label = data[y * width + x];
      if (!label) continue;
      for (let step = 1; step <= 3; step++) {
        if (x + step < width) meet(label, data[y * width + x + step]);
        if (y + step < height) meet(label, data[(y + step) * width + x]);
      }
    }
  }
  const numbers = new Map();
  for (const label of [...new Set(data)].sort((a, b) => a - b)) {
    const used = new Set([...(neighbours.get(label) ?? [])].map((other) => numbers.get(other)));
    let number = 0;
    while (number < count && used.has(number)) number++;
    numbers.set(label, number < count ? number : label % count);
  }
  return numbers;
}

/** Whether pixel i is on the edge of its cell: a 4-neighbour has another label. */
export function isEdge(labels, i) {
  const {width, data} = labels, x = i % width, label = data[i];
  return (x > 0 && data[i - 1] !== label) || (x < width - 1 && data[i + 1] !== label) ||
    (i >= width && data[i - width] !== label) || (i + width < data.length && data[i + width] !== label);
}

/** Apply a change, or undo it. */
export function apply(labels, change, undo = false) {
  const values = undo ? change.before : change.after;
  change.at.forEach((pixel, i) => { labels.data[pixel] = values[i]; });
}

/** Remove cells. */
export function remove(labels, chosen) {
  const at = pixelsOf(labels, new Set(chosen));
  return change(labels, at, at.map(() => 0));
}

/** Merge cells into one with the label `next`. Background between them is filled if they are at most MAX_GAP apart. */
export function merge(labels, chosen, next) {
  if (new Set(chosen).size < 2) throw new Error("select two cells or more to merge them (Shift and click)");
  const cells = [...pixelsByLabel(labels, new Set(chosen)).values()];
  const all = new Set(cells.flat()), distances = cells.map((pixels) => distancesTo(labels, pixels));
  for (let reach = 0; reach <= MAX_GAP; reach++) {
    const filled = reach ? new Set([...all, ...gapPixels(distances, reach)]) : all;
    if (components(labels, filled).length === 1) {
      const at = [...filled];
      return change(labels, at, at.map(() => next));
    }
  }
  throw new Error(`these cells are more than ${MAX_GAP} pixels apart: not merged`);
}

/** Cut cells along a line of points [x, y]; pieces get the labels from `next`. */
export function cut(labels, points, next) {
  const line = new Set(linePixels(labels, points));
  const crossed = new Set([...line].map((pixel) => labels.data[pixel]).filter(Boolean));
  const at = [], after = [];
  for (const pixels of pixelsByLabel(labels, crossed).values()) {
    const parts = components(labels, new Set(pixels.filter((pixel) => !line.has(pixel))))
      .filter((part) => part.length >= MIN_CELL);
    if (parts.length < 2) continue;
    const piece = pieceNumbers(labels, parts, new Set(pixels));
    for (const pixel of pixels) {
      at.push(pixel);
      after.push(next + (piece.get(pixel) ?? 0)); // a separate fragment stays with the first piece
    }
    next += parts.length;
  }
  if (!at.length) throw new Error("the line does not divide a cell: draw it across one, from outside to outside");
  return change(labels, at, after);
}

/** Cut a cell across its longest axis, through its centroid. */
export function halve(labels, label, next) {
  const {width} = labels, pixels = pixelsOf(labels, new Set([label]));
  const n = pixels.length;
  const x = pixels.map((pixel) => pixel % width), y = pixels.map((pixel) => Math.floor(pixel / width));
  const mx = x.reduce((a, b) => a + b, 0) / n, my = y.reduce((a, b) => a + b, 0) / n;
  let xx = 0, yy = 0, xy = 0;
  for (let i = 0; i < n; i++) {
    xx += (x[i] - mx) ** 2;
    yy += (y[i] - my) ** 2;
    xy += (x[i] - mx) * (y[i] - my);
  }
  const across = Math.atan2(2 * xy, xx - yy) / 2 + Math.PI / 2, reach = Math.sqrt(xx + yy) + 2;
  const end = (sign) => [mx + sign * reach * Math.cos(across), my + sign * reach * Math.sin(across)];
  const only = {...labels, data: labels.data.map((value) => (value === label ? value : 0))};
  let halves;
  try {
    halves = cut(only, [end(-1), end(1)], next);
  } catch {
    throw new Error("this cell is too small, or too bent, to be split in the middle: cut it along a line (X)");
  }
  return change(labels, halves.at, halves.after);
}

/** Add a cell with the label `next`: the largest free part inside the polygon of points [x, y]. */
export function draw(labels, points, next) {
  if (boxArea(points) > MAX_DRAWN) throw new Error(`this outline is larger than any cell (${MAX_DRAWN} pixels)`);
  const free = insidePixels(labels, points).filter((pixel) => !labels.data[pixel]);
  const parts = components(labels, new Set(free)).sort((a, b) => b.length - a.length);
  if (!parts.length || parts[0].length < MIN_CELL) {
    throw new Error("no free pixels inside this outline: delete the cell that is there first, or draw a larger one");
  }
  return change(labels, parts[0], parts[0].map(() => next));
}

function change(labels, at, after) {
  return {at, before: at.map((pixel) => labels.data[pixel]), after};
}

/** Pixels of each of some labels, in one pass: Map of label -> pixels. */
function pixelsByLabel(labels, set) {
  const pixels = new Map([...set].map((label) => [label, []]));
  labels.data.forEach((label, i) => { if (label) pixels.get(label)?.push(i); });
  return pixels;
}

function pixelsOf(labels, set) {
  const pixels = [];
  labels.data.forEach((label, i) => { if (label && set.has(label)) pixels.push(i); });
  return pixels;
}

/** The 8 neighbours of a pixel: the cells of the watershed are 8-connected. */
function* around({width, data}, i) {
  const x = i % width;
  for (const row of [i - width, i, i + width]) {
    if (row < 0 || row >= data.length) continue;
    if (x > 0) yield row - 1;
    if (row !== i) yield row;
    if (x < width - 1) yield row + 1;
  }
}

/** 8-connected components of a set of pixels. */
function components(labels, pixels) {
  const rest = new Set(pixels), parts = [];
  for (const first of pixels) {
    if (!rest.delete(first)) continue;
    const part = [first];
    for (let k = 0; k < part.length; k++) {
      for (const next of around(labels, part[k])) if (rest.delete(next)) part.push(next);
    }
    parts.push(part);
  }
  return parts;
}

/** Map of pixel -> number of its piece: the parts grow step by step into `pixels`. */
function pieceNumbers(labels, parts, pixels) {
  const piece = new Map();
  let front = [];
  parts.forEach((part, number) => part.forEach((pixel) => { piece.set(pixel, number); front.push(pixel); }));
  while (front.length) {
    const next = [];
    for (const pixel of front) {
      for (const other of around(labels, pixel)) {
        if (pixels.has(other) && !piece.has(other)) {
          piece.set(other, piece.get(pixel));
          next.push(other);
        }
      }
    }
    front = next;
  }
  return piece;
}

/** Steps (8-connected) from a cell to each background pixel at most MAX_GAP away. */
function distancesTo(labels, pixels) {
  const distance = new Map();
  let front = pixels;
  for (let step = 1; step <= MAX_GAP; step++) {
    const next = [];
    for (const pixel of front) {
      for (const other of around(labels, pixel)) {
        if (!labels.data[other] && !distance.has(other)) {
          distance.set(other, step);
          next.push(other);
        }
      }
    }
    front = next;
  }
  return distance;
}

/** Background pixels on ways of at most `reach` pixels between two of the cells with these distances. */
function gapPixels(distances, reach) {
  const filled = new Set();
  distances.forEach((own, i) => distances.slice(i + 1).forEach((other) => {
    for (const [pixel, step] of own) if (step + (other.get(pixel) ?? Infinity) <= reach + 1) filled.add(pixel);
  }));
  return filled;
}

/** Pixels of a line through points [x, y], 4-connected, so that nothing passes between them. */
function linePixels({width, height}, points) {
  const pixels = [];
  const add = (x, y) => { if (x >= 0 && y >= 0 && x < width && y < height) pixels.push(y * width + x); };
  for (let k = 1; k < points.length; k++) {
    const [x0, y0] = points[k - 1], [x1, y1] = points[k];
    const steps = Math.ceil(2 * Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0), 1));
    let px = Math.round(x0), py = Math.round(y0);
    for (let s = 0; s <= steps; s++) {
      const x = Math.round(x0 + ((x1 - x0) * s) / steps), y = Math.round(y0 + ((y1 - y0) * s) / steps);
      if (x !== px && y !== py) add(x, py);
      add(x, y);
      [px, py] = [x, y];
    }
  }
  return pixels;
}

/** Pixels in the box around points. */
function boxArea(points) {
  const span = (axis) => {
    let low = Infinity, high = -Infinity;
    for (const point of points) {
      low = Math.min(low, point[axis]);
      high = Math.max(high, point[axis]);
    }
    return high - low;
  };
  return span(0) * span(1);
}

/** Pixels whose centre is inside a polygon of points [x, y] (even-odd rule). */
function insidePixels({width, height}, points) {
  const ys = points.map((point) => point[1]), pixels = [];
  const top = Math.max(0, Math.ceil(Math.min(...ys))), bottom = Math.min(height - 1, Math.floor(Math.max(...ys)));
  for (let y = top; y <= bottom; y++) {
    const crossings = [];
    points.forEach(([x0, y0], i) => {
      const [x1, y1] = points[(i + 1) % points.length];
      if (y0 <= y !== y1 <= y) crossings.push(x0 + ((y - y0) / (y1 - y0)) * (x1 - x0));
    });
    crossings.sort((a, b) => a - b);
    for (let k = 0; k + 1 < crossings.length; k += 2) {
      const last = Math.min(width - 1, Math.floor(crossings[k + 1]));
      for (let x = Math.max(0, Math.ceil(crossings[k])); x <= last; x++) pixels.push(y * width + x);
    }
  }
  return pixels;
}
