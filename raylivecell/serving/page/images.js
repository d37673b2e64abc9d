// One image with its cells and corrections.
import {apply, fromRuns, measure, toRuns} from "./labels.js";
import {fromBase64, int32FromBase64, toBase64} from "./files.js";

const OUTSIDE = 1.5; // quartile distances beyond which an area is unusual (Tukey's fence, of log areas)

/** Median of ascending numbers; undefined without any. */
export const median = (sorted) =>
  sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : undefined;

let count = 0;

export class Picture {
  constructor(path, file, plane = "") {
    this.id = ++count;
    this.path = path; // with folders
    this.file = file;
    this.plane = plane; // of a stack, such as t1
    this.state = "waiting"; // ready, failed
    this.error = "";
    this.busy = null; // AbortController of its request
    this.options = null; // those of its cells, or of its error, as JSON
    this.reference = null; // {name, file, labels, scores}
    this.checked = false; // a person calls its cells correct
    this.done = []; // corrections
    this.undone = [];
  }

  /** As predict names it. */
  get name() {
    return this.plane ? `${this.path}#${this.plane}` : this.path;
  }

  /** Accept an answer of /segment with `view`; `options` as JSON. */
  receive(answer, options) {
    this.plane = answer.file.includes("#") ? answer.file.slice(answer.file.lastIndexOf("#") + 1) : "";
    this.png = new Blob([fromBase64(answer.image_png)], {type: "image/png"});
    this.details = new Map(answer.cells.map(({label, score, eccentricity, mean_intensity: brightness}) =>
      [label, {score, eccentricity, brightness}]));
    this.warnings = answer.warnings;
    this.labels = fromRuns(answer.width, answer.height, int32FromBase64(answer.label_runs));
    this.firstFree = 1 + answer.cells.reduce((highest, cell) => Math.max(highest, cell.label), 0);
    this.next = this.firstFree;
    Object.assign(this, {done: [], undone: [], options, state: "ready", error: ""});
    this._measure();
    this.pixels = this.covered && answer.confluence ? Math.round(this.covered / answer.confluence)
      : answer.width * answer.height; // without padding
  }

  get corrected() {
    return this.state === "ready" && this.done.length > 0;
  }

  /** Whether a person is responsible for its cells. */
  get approved() {
    return this.corrected || this.checked;
  }

  /** Whether other thresholds do not change its cells: they would also discard corrections that were undone. */
  get fixed() {
    return this.approved || this.undone.length > 0;
  }

  get confluence() {
    return this.covered / this.pixels;
  }

  /** Score of a cell; 1 for cells that a person has changed. */
  score(label) {
    return label < this.firstFree ? this.details.get(label).score : 1;
  }

  /** Run a correction of labels.js: `correct(labels, next)` returns the change. */
  correct(correct) {
    const change = correct(this.labels, this.next);
    this.done.push(change);
    this.undone = [];
    this._apply(change, false);
  }

  /** Undo the last correction; returns whether there was one. */
  undo() {
    return this._move(this.done, this.undone, true);
  }

  redo() {
    return this._move(this.undone, this.done, false);
  }

  _move(from, to, undo) {
    const change = from.pop();
    if (!change) return false;
    to.push(change);
    this._apply(change, undo);
    return true;
  }

  _apply(change, undo) {
    this.busy?.abort(); // its answer would replace the correction
    apply(this.labels, change, undo);
    this.next = change.after.reduce((next, label) => Math.max(next, label + 1), this.next);
    this._measure();
  }

  _measure() {
    this.cells = measure(this.labels);
    this.areas = [...this.cells.values()].map((cell) => cell.area).sort((a, b) => a - b);
    this.covered = this.areas.reduce((total, area) => total + area, 0);
    const scores = [...this.cells.keys()].map((label) => this.score(label));
    this.meanScore = scores.length ? scores.reduce((total, score) => total + score, 0) / scores.length : 0;
  }

  /** The cells as the service reads them. */
  async runs() {
    const {width, height} = this.labels, runs = Int32Array.from(toRuns(this.labels));
    return {width, height, label_runs: await toBase64(new Blob([runs]))};
  }

  /** Everything that an export needs, of this moment. */
  async exported() {
    const labels = [...this.cells.keys()].sort((a, b) => a - b);
    const scores = new Blob([Float64Array.from(labels, (label) => this.score(label))]);
    const parts = [this.runs(), toBase64(this.png), toBase64(scores)]; // all start before the first one waits
    const [cells, png, numbers] = await Promise.all(parts);
    return {...cells, file: this.name, image_png: png, scores: numbers};
  }
}

/** How much each image needs correction: Map of picture -> {value, reason, first}; `first` marks the upper quarter. */
export function needOfCorrection(pictures) {
  const ready = pictures.filter((picture) => picture.state === "ready" && !picture.approved);
  const logs = ready.flatMap((picture) => picture.areas.map(Math.log)).sort((a, b) => a - b);
  const quartile = (part) => logs[Math.floor(part * (logs.length - 1))] ?? 0;
  const reach = OUTSIDE * (quartile(0.75) - quartile(0.25));
  const low = quartile(0.25) - reach, high = quartile(0.75) + reach;
  const needs = ready.map((picture) => {
    const {areas, meanScore} = picture;
    const unusual = areas.filter((area) => Math.log(area) < low || Math.log(area) > high).length;
    if (!areas.length) return [picture, {value: 1, reason: "no cells found"}];
    const doubt = 1 - meanScore, share = unusual / areas.length;
    const reason = share > doubt ? `${Math.round(100 * share)} % of the cells have an unusual size`
      : `mean score ${meanScore.toFixed(2)}`;
    return [picture, {value: doubt + share, reason}];
  }).sort((a, b) => b[1].value - a[1].value);
  needs.forEach(([, need], rank) => { need.first = needs.length > 1 && rank < needs.length / 4; });
  return new Map(needs);
}
