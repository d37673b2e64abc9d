// The table of all images, sortable by each column.
import {median, needOfCorrection} from "./images.js";

const COLUMNS = [
  ["name", "image"], ["cells", "cells"], ["confluence", "confluence"], ["median", "median area, px"],
  ["score", "mean score"], ["msa", "mSA"], ["worth", "worth correcting"], ["checked", "correct"], ["remove", ""],
];
const TEXT = ["name", "worth"];

export class Table {
  /**
   * @param {object} parts  columns and rows, elements
   * @param {object} on  open(picture), check(picture), remove(picture), isOutdated(picture)
   */
  constructor({columns, rows}, on) {
    this.rows = rows;
    this.on = on;
    this.sorting = null; // {name, sign}; null: the order of arrival
    this.heads = COLUMNS.map(([name, title]) => {
      const head = document.createElement("th"), button = document.createElement("button");
      head.scope = "col";
      if (TEXT.includes(name)) head.className = "text";
      button.textContent = title;
      button.onclick = () => {
        const first = TEXT[0] === name ? 1 : -1;
        this.sorting = {name, sign: this.sorting?.name === name ? -this.sorting.sign : first};
        this.draw(this.pictures, this.current);
      };
      if (title) head.append(button);
      columns.append(head);
      return head;
    });
  }

  /** Draw the rows soon: at most once per frame. */
  draw(pictures, current) {
    Object.assign(this, {pictures, current});
    this.pending ||= requestAnimationFrame(() => {
      this.pending = 0;
      this._draw();
    });
  }

  _draw() {
    const needs = needOfCorrection(this.pictures);
    const rows = this.pictures.map((picture) => ({picture, values: rowValues(picture, needs.get(picture))}));
    if (this.sorting) {
      const {name, sign} = this.sorting;
      rows.sort((a, b) => sign * compare(a.values[name], b.values[name]));
    }
    COLUMNS.forEach(([name], i) => {
      const sorted = this.sorting?.name === name;
      this.heads[i].ariaSort = sorted ? (this.sorting.sign > 0 ? "ascending" : "descending") : "none";
    });
    this.heads[COLUMNS.findIndex(([name]) => name === "msa")].hidden = !this._hasReference();
    const focused = document.activeElement, id = focused?.closest?.("#rows tr")?.dataset.id;
    const position = id && [...focused.closest("tr").querySelectorAll("button, input")].indexOf(focused);
    this.rows.replaceChildren(...rows.map((row) => this._row(row)));
    const again = id && [...this.rows.children].find((row) => row.dataset.id === id);
    if (again) again.querySelectorAll("button, input")[position]?.focus({preventScroll: true});
  }

  _hasReference() {
    return this.pictures.some((picture) => picture.reference);
  }

  _row({picture, values}) {
    const row = document.createElement("tr"), open = document.createElement("button");
    row.dataset.id = picture.id;
    if (picture === this.current) row.setAttribute("aria-current", "true");
    open.textContent = picture.name;
    open.onclick = () => this.on.open(picture);
    row.append(cell(open, "text"));
    if (picture.state !== "ready") {
      const note = cell(picture.state === "failed" ? picture.error : picture.busy ? "finding cells" : "waiting", "text");
      note.colSpan = COLUMNS.length - 2 - !this._hasReference();
      note.classList.add(picture.state === "failed" ? "bad" : "soft");
      row.append(note, this._removal(picture));
      return row;
    }
    row.append(cell(values.cells), cell(`${(100 * values.confluence).toFixed(1)} %`), cell(values.median ?? "-"),
      cell(values.cells ? values.score.toFixed(2) : "-"));
    if (this._hasReference()) row.append(cell(values.msa < 0 ? "" : values.msa.toFixed(3)));
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = picture.approved;
    box.disabled = picture.corrected;
    box.setAttribute("aria-label", `the cells of ${picture.name} are correct`);
    box.onchange = () => { picture.checked = box.checked; this.on.check(picture); };
    row.append(cell(this._remark(picture, values), values.first ? "text bad" : "text"), cell(box), this._removal(picture));
    return row;
  }

  _remark(picture, {first, reason}) {
    if (this.on.isOutdated(picture)) return "thresholds changed: finding cells";
    if (picture.corrected) return "corrected";
    return first ? `correct first: ${reason}` : reason;
  }

  _removal(picture) {
    const button = document.createElement("button");
    button.textContent = "Remove";
    button.setAttribute("aria-label", `remove ${picture.name}`);
    button.onclick = () => this.on.remove(picture);
    return cell(button);
  }
}

function rowValues(picture, need) {
  if (picture.state !== "ready") {
    return {name: picture.name, worth: -1, cells: -1, confluence: -1, score: -1, msa: -1, checked: 0};
  }
  return {
    name: picture.name, cells: picture.cells.size, confluence: picture.confluence, median: median(picture.areas),
    score: picture.meanScore, msa: picture.reference?.scores?.msa ?? -1, checked: Number(picture.approved),
    worth: need?.value ?? -1, reason: need?.reason ?? "", first: need?.first ?? false,
  };
}

const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : (a ?? -1) - (b ?? -1));

function cell(content, name = "") {
  const element = document.createElement("td");
  element.append(content);
  element.className = name;
  return element;
}
