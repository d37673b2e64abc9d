// One image with its cells and corrections.
import {apply, fromRuns, measure, toRuns} from "./labels.js";
import {fromBase64} from "./files.js";

const OUTSIDE = 1.5; // quartile distances beyond which an area is unusual (Tukey's fence, of log areas)

export class Picture {
  constructor(path, file, plane = "") {
    this.path = path; // with folders
    this.file = file;
    this.plane = plane; // of a stack, such as t1
    this.state = "waiting"; // busy, ready, failed
    this.error = "";
    this.busy = null; // AbortController of its request
    this.reference = null; // {file, source, labels, scores}
    this.checked = false; // a person calls its cells correct
    this.options = null; // of the cells it has, as JSON
  }

  /** As predict names it. */
  get name() {
    return this.plane ? `${this.path}#${this.plane}` : this.path;
  }

  /** Take over an answer of /segment. */
  receive(answer, options) {
    this.plane = answer.file.includes("#") ? answer.file.slice(answer.file.lastIndexOf("#") + 1) : "";
    this.png = new Blob([fromBase64(answer.image_png)], {type: "image/png"});
    this.details = new Map(answer.cells.map((cell) => [cell.label, cell]));
    this.warnings = answer.warnings;
    this.labels = fromRuns(answer.width, answer.height, answer.label_runs);
    this.firstFree = 1 + answer.cells.reduce((highest, cell) => Math.max(highest, cell.label), 0);
    this.next = this.firstFree;
    Object.assign(this, {done: [], undone: [], options, state: "ready", error: ""});
    this._measure();
    const covered = this.covered();
    this.pixels = covered && answer.confluence ? Math.round(covered / answer.confluence) : answer.width * answer.height;
  }

  get corrected() {
    return this.state === "ready" && this.done.length > 0;
  }

  covered() {
    return [...this.cells.values()].reduce((total, cell) => total + cell.area, 0);
  }

  get confluence() {
    return this.covered() / this.pixels;
  }

  areas() {
    return [...this.cells.values()].map((cell) => cell.area);
  }

  /** Score of a cell; 1 for cells that a person has changed. */
  score(label) {
    return label < this.firstFree ? this.details.get(label).score : 1;
  }

  meanScore() {
    const labels = [...this.cells.keys()];
    return labels.length ? labels.reduce((total, label) => total + this.score(label), 0) / labels.length : 0;
  }

  /** Run a correction of labels.js: `correct(labels, next)` returns the change. */
  correct(correct) {
    const change = correct(this.labels, this.next);
    this.done.push(change);
    this.undone = [];
    this._apply(change, false);
  }

  undo() {
    const change = this.done.pop();
    if (change) {
      this.undone.push(change);
      this._apply(change, true);
    }
  }

  redo() {
    const change = this.undone.pop();
    if (change) {
      this.done.push(change);
      this._apply(change, false);
    }
  }

  _apply(change, undo) {
    apply(this.labels, change, undo);
    this.next = change.after.reduce((next, label) => Math.max(next, label + 1), this.next);
    this.reference = this.reference && {...this.reference, scores: null};
    this._measure();
  }

  _measure() {
    this.cells = measure(this.labels);
  }

  /** The cells as the service reads them. */
  runs() {
    return {width: this.labels.width, height: this.labels.height, label_runs: toRuns(this.labels)};
  }

  scores() {
    return [...this.cells.keys()].sort((a, b) => a - b).map((label) => this.score(label));
  }
}

/** How much each image is worth correcting: Map of picture -> {value, reason, first}; `first` marks the upper quarter. */
export function worthCorrecting(pictures) {
  const ready = pictures.filter((picture) => picture.state === "ready" && !picture.checked && !picture.corrected);
  const logs = ready.flatMap((picture) => picture.areas().map(Math.log)).sort((a, b) => a - b);
  const quartile = (part) => logs[Math.floor(part * (logs.length - 1))] ?? 0;
  const reach = OUTSIDE * (quartile(0.75) - quartile(0.25));
  const low = quartile(0.25) - reach, high = quartile(0.75) + reach;
  const worth = ready.map((picture) => {
    const areas = picture.areas(), unusual = areas.filter((area) => Math.log(area) < low || Math.log(area) > high).length;
    if (!areas.length) return [picture, {value: 1, reason: "no cells found"}];
    const doubt = 1 - picture.meanScore(), odd = unusual / areas.length;
    const reason = odd > doubt ? `${Math.round(100 * odd)} % of the cells have an unusual size` : `mean score ${(1 - doubt).toFixed(2)}`;
    return [picture, {value: doubt + odd, reason}];
  }).sort((a, b) => b[1].value - a[1].value);
  worth.forEach(([, entry], place) => { entry.first = worth.length > 1 && place < worth.length / 4; });
  return new Map(worth);
}
