// Growth curves of images whose names have a well and a time: computed by the service, drawn here.
import * as charts from "./charts.js";
import {median} from "./images.js";
import {pageData} from "./service.js";

const WAIT_MS = 300; // until no further result has arrived

export class Growth {
  /** @param {object} parts  elements: section, frames, hours, notes, curves  @param {function} fail */
  constructor(parts, fail) {
    this.parts = parts;
    this.fail = fail;
    this.page = ""; // the report, HTML
    this.key = ""; // the request of the curves shown
  }

  /** Compute the curves again, when every picture has its cells. */
  schedule(pictures) {
    clearTimeout(this.timer);
    const ready = pictures.filter((picture) => picture.state === "ready");
    if (ready.length > 1 && !pictures.some((picture) => picture.busy)) {
      this.timer = setTimeout(() => this._compute(ready), WAIT_MS);
    }
  }

  async _compute(ready) {
    const {section, frames, hours, notes, curves} = this.parts;
    const images = ready.map((picture) => ({
      file: picture.name, cells: picture.cells.size, confluence: Math.min(picture.confluence, 1), area: median(picture.areas) ?? null,
      width: picture.labels.width, height: picture.labels.height, has_warning: picture.warnings.length > 0,
    }));
    const body = {images, frame_hours: Number(hours.value) || null}, key = JSON.stringify(body);
    if (key === this.key) return;
    this.key = key;
    frames.hidden = !ready.some((picture) => /(^|_)t\d/.test(picture.plane));
    let answer;
    try {
      answer = await pageData("growth", body);
    } catch (error) {
      this.fail(`growth curves: ${error.message}`);
      return;
    }
    if (key !== this.key) return;
    this.page = answer.page ?? "";
    section.hidden = !answer.charts.length && frames.hidden;
    notes.replaceChildren(...answer.notes.map((note) => text("p", note, "soft")));
    curves.replaceChildren(...answer.charts.map(curve));
  }
}

function curve(card) {
  const section = document.createElement("section"), row = document.createElement("div");
  section.className = "curve";
  row.className = "three";
  for (const chart of card.charts) {
    const figure = document.createElement("figure");
    figure.append(text("figcaption", chart.title), charts.growthChart(chart));
    row.append(figure);
  }
  const trusted = !card.reasons.length;
  section.append(text("h3", card.title),
    text("p", `Doubling time of the count: ${card.doubling}`, trusted ? "good" : "bad"),
    text("p", trusted ? "" : `Not to be trusted: ${card.reasons.join("; ")}.`, "bad"), row);
  return section;
}

function text(name, content, style = "") {
  const element = document.createElement(name);
  element.textContent = content;
  element.className = style;
  return element;
}
