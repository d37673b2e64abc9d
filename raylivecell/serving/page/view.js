// The image with its cells on a canvas: zoom, pan, hover, selection, and lines drawn by the pointer.
import {colourNumbers, isEdge} from "./labels.js";

export const CELL_COLOURS = ["#f0e442", "#46c8ff", "#ff781e", "#3ceb96", "#ff8cd7", "#ffffff"];
const REFERENCE = [255, 0, 200, 255];
// Viridis at eight steps: a scale that is also ordered in grey and for every colour vision.
const SCALE = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
const FILL = 80; // alpha of a filled cell, of 255
const MAX_ZOOM = 40;

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const scaleRgb = SCALE.map(rgb);

/** Colour of a value from 0 to 1. */
export function scaleColour(value) {
  const place = Math.min(Math.max(value, 0), 1) * (SCALE.length - 1);
  const low = Math.min(Math.floor(place), SCALE.length - 2), part = place - low;
  return scaleRgb[low].map((channel, k) => Math.round(channel + part * (scaleRgb[low + 1][k] - channel)));
}

export class View {
  /** @param {HTMLCanvasElement} canvas  @param {object} on  hover(label, event), pick(label, event), line(points, mode) */
  constructor(canvas, on) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.on = on;
    this.image = null; // ImageBitmap
    this.cells = new OffscreenCanvas(1, 1);
    this.labels = null;
    this.reference = null;
    this.selected = new Set();
    this.mode = "look"; // or "cut", "draw": the pointer draws a line
    this.line = [];
    this.show = {outlines: true, fills: false, colour: "cell"};
    this.zoom = 1;
    this.left = 0; // image coordinates of the canvas' upper left corner
    this.top = 0;
    this.isFitted = true; // the entire image is shown, also after a resize
    this.size = null; // of the last image
    new ResizeObserver(() => this._resize()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this._down(event));
    canvas.addEventListener("pointermove", (event) => this._move(event));
    canvas.addEventListener("pointerup", (event) => this._up(event));
    canvas.addEventListener("pointercancel", () => this.cancel());
    canvas.addEventListener("pointerleave", (event) => this.on.hover(0, event));
    canvas.addEventListener("wheel", (event) => this._wheel(event), {passive: false});
  }

  /** Show an image with its cells, painted afterwards; the zoom stays if the image has the size of the one before. */
  open(image, labels) {
    this.image = image;
    this.labels = labels;
    if (image.width !== this.size?.width || image.height !== this.size?.height) this.isFitted = true;
    this.size = {width: image.width, height: image.height};
  }

  /** Accept no pointer on the cells until others are opened: they belong to another picture. */
  detach() {
    this.labels = null;
    this.selected.clear();
    this.cancel();
  }

  /** Give up the line or movement of the pointer. */
  cancel() {
    this.drag = null;
    this.line = [];
    this.draw();
  }

  /** Show nothing. */
  close() {
    this.image = this.labels = this.reference = null;
    this.draw();
  }

  /** Paint the cells again: labels, colours or options have changed. `values`: Map of label -> 0 to 1, for a scale. */
  paint(values) {
    const {width, height, data} = this.labels;
    if (this.cells.width !== width || this.cells.height !== height) this.cells = new OffscreenCanvas(width, height);
    const context = this.cells.getContext("2d"), pixels = context.createImageData(width, height);
    const colours = this._colours(values), {outlines, fills} = this.show;
    for (let i = 0; i < data.length; i++) {
      if (!data[i] || !(outlines || fills)) continue;
      const edge = isEdge(this.labels, i);
      if (!fills && !edge) continue;
      pixels.data.set(colours.get(data[i]), 4 * i);
      pixels.data[4 * i + 3] = outlines && edge ? 255 : FILL;
    }
    if (this.reference) {
      for (let i = 0; i < data.length; i++) {
        if (this.reference.data[i] && isEdge(this.reference, i)) pixels.data.set(REFERENCE, 4 * i);
      }
    }
    context.putImageData(pixels, 0, 0);
    if (this.isFitted) this.fit();
    else this.draw();
  }

  _colours(values) {
    if (this.show.colour !== "cell") return new Map([...values].map(([label, value]) => [label, scaleColour(value)]));
    const colours = CELL_COLOURS.map(rgb);
    return new Map([...colourNumbers(this.labels, colours.length)].map(([label, number]) => [label, colours[number]]));
  }

  /** Draw image, cells, selection and the line of the pointer. */
  draw() {
    const {context, canvas, image} = this, ratio = devicePixelRatio;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!image) return;
    const scale = this.zoom * ratio;
    context.setTransform(scale, 0, 0, scale, -this.left * scale, -this.top * scale);
    context.imageSmoothingEnabled = this.zoom < 2;
    context.drawImage(image, 0, 0);
    context.drawImage(this.cells, 0, 0);
    this._drawSelection(context);
    if (this.line.length > 1) {
      context.strokeStyle = "#ff2d55";
      context.lineWidth = 2 / this.zoom;
      context.beginPath();
      this.line.forEach(([x, y], i) => (i ? context.lineTo(x + 0.5, y + 0.5) : context.moveTo(x + 0.5, y + 0.5)));
      if (this.mode === "draw") context.closePath();
      context.stroke();
    }
  }

  _drawSelection(context) {
    if (!this.selected.size || !this.labels) return;
    const {width, data} = this.labels, side = Math.max(1, 3 / this.zoom), shift = (side - 1) / 2;
    for (let i = 0; i < data.length; i++) {
      if (!this.selected.has(data[i])) continue;
      const x = i % width, y = Math.floor(i / width);
      if (isEdge(this.labels, i)) {
        context.fillStyle = "#ff2d55";
        context.fillRect(x - shift, y - shift, side, side);
      } else {
        context.fillStyle = "rgba(255, 45, 85, .3)";
        context.fillRect(x, y, 1, 1);
      }
    }
  }

  /** Show the entire image. */
  fit() {
    if (!this.image) return;
    this.isFitted = true;
    const {clientWidth, clientHeight} = this.canvas;
    this.zoom = Math.min(clientWidth / this.image.width, clientHeight / this.image.height) || 1;
    this.left = (this.image.width - clientWidth / this.zoom) / 2;
    this.top = (this.image.height - clientHeight / this.zoom) / 2;
    this.draw();
  }

  /** Zoom by a factor, around a point of the canvas (default: its centre). */
  zoomBy(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const zoom = Math.min(Math.max(this.zoom * factor, 0.02), Math.max(MAX_ZOOM, this.zoom));
    this.isFitted = false;
    this.left += x / this.zoom - x / zoom;
    this.top += y / this.zoom - y / zoom;
    this.zoom = zoom;
    this.draw();
  }

  /** Move the image by pixels of the screen. */
  panBy(x, y) {
    this.isFitted = false;
    this.left += x / this.zoom;
    this.top += y / this.zoom;
    this.draw();
  }

  /** Move the image so that a point of it is visible. */
  reveal(x, y) {
    const width = this.canvas.clientWidth / this.zoom, height = this.canvas.clientHeight / this.zoom;
    if (x < this.left || x > this.left + width) this.left = x - width / 2;
    if (y < this.top || y > this.top + height) this.top = y - height / 2;
    this.draw();
  }

  /** Image coordinates of an event; the centre of the upper left pixel is 0, 0. */
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / this.zoom + this.left - 0.5, (event.clientY - box.top) / this.zoom + this.top - 0.5];
  }

  labelAt([x, y]) {
    const column = Math.round(x), row = Math.round(y);
    if (!this.labels || column < 0 || row < 0 || column >= this.labels.width || row >= this.labels.height) return 0;
    return this.labels.data[row * this.labels.width + column];
  }

  _down(event) {
    if (!this.image || event.button > 1) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = {x: event.clientX, y: event.clientY, moved: false, mode: this.mode};
    this.line = this.mode === "look" || event.button === 1 ? [] : [this.point(event)];
  }

  _move(event) {
    if (!this.drag) {
      this.on.hover(this.labelAt(this.point(event)), event);
      return;
    }
    const x = event.clientX - this.drag.x, y = event.clientY - this.drag.y;
    if (!this.drag.moved && Math.hypot(x, y) < 3) return;
    this.drag.moved = true;
    if (this.line.length) {
      this.line.push(this.point(event));
      this.draw();
    } else {
      this.panBy(-x, -y);
      Object.assign(this.drag, {x: event.clientX, y: event.clientY});
    }
  }

  _up(event) {
    if (!this.drag) return;
    const {moved, mode} = this.drag, line = this.line;
    this.drag = null;
    this.line = [];
    if (line.length > 1) this.on.line(line, mode);
    else if (!moved) this.on.pick(this.labelAt(this.point(event)), event);
    this.draw();
  }

  _wheel(event) {
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    this.zoomBy(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }

  _resize() {
    const {clientWidth, clientHeight} = this.canvas;
    this.canvas.width = clientWidth * devicePixelRatio;
    this.canvas.height = clientHeight * devicePixelRatio;
    if (this.isFitted) this.fit();
    else this.draw();
  }
}
